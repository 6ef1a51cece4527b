"""`lemo calibrate` on models of four layers trained on real text: what it finds, leaves, takes up again and refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained import FAMILIES, load

import lemo
from lemo.calibration import judging
from lemo.calibration.config import CalibrationConfig
from lemo.calibration.job import calibrate
from lemo.calibration.stored import LEDGER
from lemo.cli.main import run
from lemo.errors import UserError
from lemo.models.calibration import FACTS_FILE, TENSORS_FILE, read_calibration
from lemo.report import build_calibration


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family: str, place: Any) -> None:
    facts = read_calibration(place.calibration(family)).facts
    assert facts.average_keep == pytest.approx(0.75, abs=0.03)
    assert facts.loss_uniform is not None
    assert facts.loss_dense - 0.01 < facts.loss_sparse < facts.loss_uniform
    assert facts.branches.keys() == {"attention", "mlp"}
    for name, branch in facts.branches.items():
        # Random blocks would have 0.5.
        assert sum(branch.recall) / 4 > 0.85
        assert sum(branch.size) < 0.66 * sum(branch.first_size)
        assert (len(set(branch.size)) > 1) == (name == "attention")
        assert branch.explained is not None
        assert all(0 < share <= 1 for share in branch.explained)
        assert all((t == 0) == (k == 1) for t, k in zip(branch.thresholds, branch.keep, strict=True))


@pytest.mark.parametrize(
    ("values", "dense_share", "keep"),
    [
        ({"keep": 0.75}, 2 / 3, 0.25),
        ({"keep": 0.9}, 13 / 15, 0.25),
        ({"keep": 0.5}, 1 / 3, 0.25),
        ({"keep": 0.2}, 0.0, 0.2),
        ({"keep": 1.0}, 0.0, 1.0),
        ({"keep": 0.75, "branches": "attention"}, 0.0, 0.5),
        ({"keep": 0.8, "branches": "mlp", "dense_share": 0.2}, 0.2, 0.5),
        ({"loss_tolerance": 0.1}, 0.0, 0.75),
    ],
)
def test_dense_passes_count_in_keep(values: dict[str, Any], dense_share: float, keep: float) -> None:
    config = CalibrationConfig(**values)
    assert config.share_of_dense_passes == pytest.approx(dense_share)
    assert config.keep_of_unit == pytest.approx(keep)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", ["allocation=algorithm1"]),
        ("llama", ["allocation=uniform", "branches=mlp"]),
        ("llama", ["loss_tolerance=0.02", "bypass_rank=0"]),
        ("qwen2", ["score=causal"]),
        ("qwen3", ["allocation=uniform"]),
        ("llama", ["score=mass"]),
    ],
)
def test_other_ways(family: str, changes: list[str], place: Any, tmp_path: Path) -> None:
    config = place.config(family, tmp_path / "c", *changes)
    facts = calibrate(config).facts
    if config.loss_tolerance is None:
        assert facts.average_keep == pytest.approx(0.75, abs=0.03)
    else:
        assert facts.average_keep < 0.9
        assert facts.loss_sparse <= facts.loss_dense + config.loss_tolerance + 1e-4
        assert all(branch.explained is None for branch in facts.branches.values())
    if config.branches == "mlp":
        assert facts.branches.keys() == {"mlp"}
        assert all(k == pytest.approx(0.5, abs=0.05) for k in facts.branches["mlp"].keep)
    if config.allocation == "algorithm1":
        assert facts.loss_uniform is not None
        assert facts.loss_sparse < facts.loss_uniform
    sparsity = lemo.SparsityConfig(mode="forward", calibration=str(tmp_path / "c"), score=config.score)
    lemo.sparsify(load(place, family), sparsity)


def test_an_interrupted_calibration_goes_on(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_calibration(place.calibration("llama")).facts
    config = place.config("llama", tmp_path / "c", "dense_share=0.5")
    calls = 0
    append = judging._append

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        append(*arguments)
        if calls == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(judging, "_append", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config)
    assert not (tmp_path / "c" / FACTS_FILE).exists()
    with pytest.raises(ValueError, match="isn't finished"):
        read_calibration(tmp_path / "c")
    # A kill in the middle of a line.
    ledger = tmp_path / "c" / LEDGER
    ledger.write_text(ledger.read_text() + '{"thresholds": "[[')
    monkeypatch.setattr(judging, "_append", append)
    with pytest.raises(UserError, match="not empty"):
        calibrate(config)
    with pytest.raises(UserError, match="keep differ"):
        calibrate(place.config("llama", tmp_path / "c", "keep=0.6", "dense_share=0.5"), resume=True)
    fitted = load_file(tmp_path / "c" / "fitted.safetensors")
    found = calibrate(config, resume=True)
    for name, branch in found.facts.branches.items():
        for field, values in branch.model_dump().items():
            # Where tensors lie in memory decides the last bits.
            assert values == pytest.approx(getattr(whole.branches[name], field), rel=1e-4, abs=1e-6), (name, field)
    assert found.facts.fingerprint == whole.fingerprint
    assert all(torch.equal(t, fitted[name]) for name, t in load_file(tmp_path / "c" / TENSORS_FILE).items())
    lines = [json.loads(line)["thresholds"] for line in ledger.read_text().splitlines()]
    assert len(lines) == len(set(lines)), "nothing was measured twice"
    assert calibrate(config, resume=True).facts == found.facts


def test_another_keep_takes_over_what_was_fitted(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = place.calibration("llama")
    old = read_calibration(earlier)
    append, written = judging._append, []
    monkeypatch.setattr(judging, "_append", lambda *arguments: (written.append(arguments), append(*arguments)))
    found = calibrate(place.config("llama", tmp_path / "a", f"reuse={earlier}", "keep=0.6"))
    assert found.facts.average_keep == pytest.approx(0.6, abs=0.03)
    # Of 32 costs; thresholds are corrected in eight passes at most.
    assert len(written) < 12, "costs were measured again"
    assert found.facts.branches["mlp"].cost == old.facts.branches["mlp"].cost
    for key, predictor in found.predictors.items():
        assert all(torch.equal(a, old.predictors[key].state_dict()[n]) for n, a in predictor.state_dict().items())
    # Without bypasses the losses are others.
    bare = calibrate(place.config("llama", tmp_path / "b", f"reuse={earlier}", "bypass_rank=0", "branches=mlp"))
    assert not bare.bypasses
    assert {branch for _, branch in bare.predictors} == {"mlp"}
    assert bare.facts.branches["mlp"].cost != old.facts.branches["mlp"].cost
    for changes, match in {
        ("block_size=32",): "block_size differ",
        ("bypass_rank=4",): "bypass_rank differ",
        ("fit_sequences=4",): "data differ",
    }.items():
        with pytest.raises(UserError, match=match):
            calibrate(place.config("llama", tmp_path / "c" / match, f"reuse={earlier}", *changes))
    with pytest.raises(UserError, match="another model"):
        calibrate(place.config("qwen2", tmp_path / "d", f"reuse={earlier}"))


def test_bad_settings(place: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="four blocks"):
        calibrate(place.config("llama", tmp_path / "a", "block_size=256"))
    with pytest.raises(UserError, match="can't be reached"):
        place.config("llama", tmp_path / "b", "branches=attention", "keep=0.4")
    with pytest.raises(UserError, match="can't be reached"):
        place.config("llama", tmp_path / "b", "keep=0.4", "dense_share=0.5")
    with pytest.raises(UserError, match="positions"):
        calibrate(place.config("llama", tmp_path / "c", "data.max_tokens=4096"))
    with pytest.raises(UserError, match="packing"):
        place.config("llama", tmp_path / "d", "data.packing=true")
    with pytest.raises(UserError, match="loss_tolerance"):
        place.config("llama", tmp_path / "e", "allocation=algorithm1", "loss_tolerance=0.1")


def test_the_page(place: Any) -> None:
    path = build_calibration(place.calibration("llama"))
    html = path.read_text()
    assert html.count("<svg") == 3
    for words in ("calibrated for forward mode", "What each layer keeps", "predicted and exact", "recall of half"):
        assert words in html


def test_the_command_line(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(place.calibration("llama"), directory)
    arguments = ["--data", str(place.texts), "--model", str(place.model("llama")), "--output", str(directory)]
    config = ["--config", str(directory / "config.yaml")]
    monkeypatch.setattr(sys, "argv", ["lemo", "calibrate", "--resume", "--json", *config, *arguments])
    with pytest.raises(SystemExit) as stop:
        run()
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert json.loads(out)["average_keep"] == pytest.approx(0.75, abs=0.03)
    assert (directory / "report.html").is_file()
    monkeypatch.setattr(sys, "argv", ["lemo", "calibrate", "--set", "keep=2", *arguments])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "keep" in capsys.readouterr().err


def test_its_records(place: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.record_calibration import rows_of

    facts = read_calibration(place.calibration("llama")).facts
    whole, *layers = rows_of(facts)
    assert whole.keep == facts.average_keep
    assert whole.setting == "curves, keep 0.75, both, paper, bypass 8, rank 48, size 0.65, 100 steps"
    assert len(layers) == 8
    assert whole.recall == pytest.approx(sum(row.recall for row in layers) / 8)
    assert whole.details["lowest_recall"] == min(row.recall for row in layers)
    assert {row.bench for row in (whole, *layers)} == {"calibration"}
