"""`lemo calibrate` on models of four layers trained on real text: what it finds, and that training takes it up."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lemo
from lemo.calibration import judging
from lemo.calibration.config import CalibrationConfig
from lemo.calibration.job import calibrate
from lemo.calibration.stored import LEDGER
from lemo.cli.main import run
from lemo.config import BranchSelection
from lemo.config_io import load_config
from lemo.errors import UserError
from lemo.models import get_runtime, sparse_evaluation
from lemo.models.calibration import FACTS_FILE, TENSORS_FILE, read_calibration
from lemo.report import build_calibration
from lemo.training import finetune

FAMILIES = ["llama", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family: str, place: Any) -> None:
    facts = read_calibration(place.calibration(family)).facts
    assert facts.average_keep == pytest.approx(0.75, abs=0.03)
    assert facts.loss_uniform is not None
    assert facts.loss_dense - 0.01 < facts.loss_sparse < facts.loss_uniform
    assert facts.branches.keys() == {"attention", "mlp"}
    for branch in facts.branches.values():
        # Random blocks would have 0.5.
        assert sum(branch.recall) / 4 > 0.85
        assert sum(branch.size) < 0.9 * sum(branch.first_size)
        assert branch.explained is not None
        assert all(0 < share <= 1 for share in branch.explained)
        assert all((t == 0) == (k == 1) for t, k in zip(branch.thresholds, branch.keep, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_finetune_takes_it_up(family: str, place: Any, tmp_path: Path) -> None:
    settings = load_config(
        None,
        data=str(place.texts),
        model=str(place.model(family)),
        output=str(tmp_path / "run"),
        overrides=[
            "device=cpu",
            "data.max_tokens=512",
            "data.heldout_share=0.2",
            "sparsity.mode=forward",
            f"sparsity.calibration={place.calibration(family)}",
            "training.steps=8",
            "training.learning_rate=5e-3",
            "training.save_every=0",
            "evaluation.documents=4",
            "evaluation.sample_tokens=0",
        ],
    )
    summary = finetune(settings)
    assert summary.keep_mean == pytest.approx(0.75, abs=0.08)
    assert summary.loss_after < summary.loss_before
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_resumes_with_its_calibration_only(place: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place.calibration("llama"), moved)
    overrides = [
        "device=cpu",
        "data.max_tokens=512",
        "data.heldout_share=0.2",
        "sparsity.mode=forward",
        f"sparsity.calibration={place.calibration('llama')}",
        "training.steps=2",
        "training.save_every=2",
        "evaluation.documents=0",
    ]

    def settings(*more: str) -> Any:
        places = {"data": str(place.texts), "model": str(place.model("llama")), "output": str(tmp_path / "run")}
        return load_config(None, **places, overrides=[*overrides, *more])

    finetune(settings())
    finetune(settings(f"sparsity.calibration={moved}"), resume=True)
    _edit(moved, seconds=1.5)
    with pytest.raises(UserError, match="calibration"):
        finetune(settings(f"sparsity.calibration={moved}"), resume=True)


def test_bypasses_that_train_resume_where_they_were(place: Any, tmp_path: Path) -> None:
    overrides = [
        "device=cpu",
        "data.max_tokens=512",
        "data.heldout_share=0.2",
        "sparsity.mode=forward",
        "sparsity.train_bypass=true",
        f"sparsity.calibration={place.calibration('llama')}",
        "training.learning_rate=5e-3",
        "training.scheduler=constant",
        "training.steps=4",
        "training.save_every=2",
        "evaluation.documents=0",
    ]

    def settings(name: str) -> Any:
        places = {"data": str(place.texts), "model": str(place.model("llama")), "output": str(tmp_path / name)}
        return load_config(None, **places, overrides=overrides)

    finetune(settings("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    finetune(settings("parts"), resume=True)
    whole, parts = (
        load_file(tmp_path / name / "checkpoint-4" / "lemo_bypasses.safetensors") for name in ("whole", "parts")
    )
    calibration = read_calibration(place.calibration("llama"))
    assert {name: t.shape for name, t in whole.items()} == {name: t.shape for name, t in parts.items()}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for (layer, branch), fitted in calibration.bypasses.items():
        used = calibration.facts.branches[branch].thresholds[layer] > 0
        assert torch.equal(whole[f"{layer}.{branch}.bypass.a"], fitted.a) != used
    adapter = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)


def load(place: Any, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(place.model(family), dtype=dtype)


def ids_of(place: Any) -> torch.Tensor:
    text = sorted(place.texts.iterdir())[0].read_bytes()
    return torch.tensor([list(text)]) % 200


def test_a_model_takes_thresholds_predictors_and_bypasses(place: Any) -> None:
    directory = place.calibration("llama")
    facts = read_calibration(directory).facts
    model = lemo.sparsify(load(place), lemo.SparsityConfig(mode="forward", calibration=str(directory)))
    runtime = get_runtime(model)
    assert runtime is not None
    assert runtime.config.block_size == facts.block_size == 16
    assert (runtime.config.dense_share, runtime.config.train_bypass) == (facts.dense_share, True) == (0.5, True)
    assert runtime.config.attention == BranchSelection(threshold=tuple(facts.branches["attention"].thresholds))
    assert len(runtime.predictors) == len(runtime.bypasses) == 8
    ids = ids_of(place)
    with torch.no_grad():
        model.eval()
        dense = model(input_ids=ids).logits
        with sparse_evaluation(model):
            sparse = model(input_ids=ids).logits
        assert any(plan.keep < 1 for plan in runtime.last_plans.values())
        assert not torch.equal(dense, sparse)
    lemo.restore(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_what_the_caller_says_goes_before_the_defaults(place: Any) -> None:
    calibration = str(place.calibration("llama"))
    said = lemo.SparsityConfig(mode="forward", calibration=calibration, dense_share=0.0, train_bypass=False)
    runtime = get_runtime(lemo.sparsify(load(place), said))
    assert runtime is not None
    assert (runtime.config.dense_share, runtime.config.train_bypass) == (0.0, False)
    own_keep = lemo.SparsityConfig(mode="forward", calibration=calibration, keep=0.5)
    runtime = get_runtime(lemo.sparsify(load(place), own_keep))
    assert runtime is not None
    assert not runtime.config.dense_share


@pytest.mark.parametrize(
    ("values", "dense_share", "keep"),
    [
        ({"keep": 0.75}, 0.5, 0.5),
        ({"keep": 0.9}, 0.5, 0.8),
        ({"keep": 0.6}, 0.2, 0.5),
        ({"keep": 0.4}, 0.0, 0.4),
        ({"keep": 0.75, "branches": "attention"}, 0.0, 0.5),
        ({"keep": 0.8, "branches": "mlp", "dense_share": 0.2}, 0.2, 0.5),
        ({"loss_tolerance": 0.1}, 0.0, 0.75),
    ],
)
def test_dense_passes_count_in_keep(values: dict[str, Any], dense_share: float, keep: float) -> None:
    config = CalibrationConfig(**values)
    assert config.share_of_dense_passes == pytest.approx(dense_share)
    assert config.keep_of_unit == pytest.approx(keep)


def test_keep_goes_before_the_thresholds(place: Any) -> None:
    config = lemo.SparsityConfig(mode="forward", calibration=str(place.calibration("llama")), keep=0.5)
    model = lemo.sparsify(load(place), config)
    runtime = get_runtime(model)
    assert runtime is not None
    with torch.no_grad(), sparse_evaluation(model.eval()):
        model(input_ids=ids_of(place))
    assert all(plan.keep == pytest.approx(0.5, abs=0.05) for plan in runtime.last_plans.values())


def test_predicted_plans_are_the_exact_ones_but_for_some_blocks(place: Any) -> None:
    plans = []
    for calibration in (str(place.calibration("llama")), None):
        config = lemo.SparsityConfig(mode="forward", calibration=calibration, keep=0.5, block_size=16)
        model = lemo.sparsify(load(place), config)
        runtime = get_runtime(model)
        assert runtime is not None
        with torch.no_grad(), sparse_evaluation(model.eval()):
            model(input_ids=ids_of(place))
        plans.append({tuple(key): set(plan.rows.tolist()) for key, plan in runtime.last_plans.items()})
    first = plans[0][0, "attention"] & plans[1][0, "attention"]
    # Random ones would share half.
    assert len(first) >= 0.7 * len(plans[1][0, "attention"])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", ["allocation=algorithm1"]),
        ("llama", ["allocation=uniform", "branches=mlp"]),
        ("llama", ["loss_tolerance=0.02", "bypass_rank=0"]),
        ("qwen2", ["score=causal"]),
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
    config = place.config("llama", tmp_path / "c")
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
        calibrate(place.config("llama", tmp_path / "c", "keep=0.5"), resume=True)
    fitted = load_file(tmp_path / "c" / "fitted.safetensors")
    found = calibrate(config, resume=True)
    for name, branch in found.facts.branches.items():
        for field, values in branch.model_dump().items():
            # Where tensors lie in memory decides the last bits.
            assert values == pytest.approx(getattr(whole.branches[name], field), rel=1e-4, abs=1e-6), (name, field)
    assert (found.facts.fingerprint, found.facts.widths) == (whole.fingerprint, whole.widths)
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
    # Of 24 costs; thresholds are corrected in eight passes at most.
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


def refused(place: Any, directory: Path, match: str, model: Any = None, **sparsity: Any) -> None:
    config = lemo.SparsityConfig(mode="forward", calibration=str(directory), **sparsity)
    with pytest.raises(ValueError, match=match):
        lemo.sparsify(load(place) if model is None else model, config)


def test_what_doesnt_fit_is_refused(place: Any, tmp_path: Path) -> None:
    good = place.calibration("llama")
    refused(place, good, "another model", model=load(place, "qwen2"))
    other = load(place)
    with torch.no_grad():
        other.model.layers[2].input_layernorm.weight[3] += 0.1
    refused(place, good, "another model", model=other)
    refused(place, good, "calibrated in float32, this model is in bfloat16", model=load(place, dtype=torch.bfloat16))
    refused(place, good, "block_size is 64", block_size=64)
    refused(place, good, "score is causal", score="causal")
    refused(place, tmp_path / "nowhere", "holds no calibration.json")
    for name, damage in {
        "format": lambda d: _edit(d, format=99),
        "field": lambda d: _edit(d, block_size="x"),
        "json": lambda d: (d / FACTS_FILE).write_text("{"),
        "no tensors": lambda d: (d / TENSORS_FILE).unlink(),
        "cut": lambda d: (d / TENSORS_FILE).write_bytes((d / TENSORS_FILE).read_bytes()[:200]),
        "missing": lambda d: save_file(dict(list(load_file(d / TENSORS_FILE).items())[5:]), d / TENSORS_FILE),
    }.items():
        copy = tmp_path / name
        shutil.copytree(good, copy)
        damage(copy)
        refused(place, copy, "format 99" if name == "format" else "damaged")


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / FACTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_same_model_with_lora_is_the_same_model(place: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(place), LoraConfig(r=2, target_modules="all-linear"))
    lemo.sparsify(model, lemo.SparsityConfig(mode="forward", calibration=str(place.calibration("llama"))))


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
    assert whole.setting == "curves, keep 0.75, both, paper, bypass 8"
    assert len(layers) == 8
    assert whole.recall == pytest.approx(sum(row.recall for row in layers) / 8)
    assert whole.details["lowest_recall"] == min(row.recall for row in layers)
    assert {row.bench for row in (whole, *layers)} == {"calibration"}
