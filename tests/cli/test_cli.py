"""The commands in their good cases, and Ctrl-C. What goes wrong otherwise is in `scripts/bad_input.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lemo.cli.main import run
from lemo.training import finetune
from lemo.training.trainer import LemoTrainer
from tiny_run import QUICK, run_settings, save_model, save_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "model")
    save_texts(root / "data")
    finetune(run_settings(root / "model", root / "data", root / "run"))
    return root


def lemo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Runs the command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["lemo", *arguments])
    with pytest.raises(SystemExit) as stop:
        run()
    return stop.value.code


def common(place: Path, *overrides: str) -> list[str]:
    settings = [part for override in (*QUICK, *overrides) for part in ("--set", override)]
    return ["--model", str(place / "model"), "--data", str(place / "data"), *settings]


def test_finetune_prints_one_json_object_and_writes_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = lemo(monkeypatch, "finetune", *common(place), "--output", str(tmp_path / "run"), "--json")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert json.loads(out) == json.loads((tmp_path / "run/summary.json").read_text())
    assert out.count("\n") == 1
    assert "held-out loss after" in err
    assert "step 6/6" in err
    written = {path.name for path in (tmp_path / "run").iterdir()}
    records = {"adapter", "config.yaml", "metrics.jsonl", "report.html", "summary.json"}
    assert written == records | {"checkpoint-4", "checkpoint-6"}


def test_resume_needs_the_output_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(trainer: LemoTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    original = LemoTrainer.compute_loss
    output = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(LemoTrainer, "compute_loss", interrupt)
        status = lemo(monkeypatch, "finetune", *common(place), "--output", output)
    assert status == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        f"interrupted; go on from checkpoint-2 with: lemo finetune --resume --output {output}"
    )
    assert "Traceback" not in err

    assert lemo(monkeypatch, "finetune", "--resume", "--output", output) == 0
    assert "6 steps" in capsys.readouterr().out
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (place / "run" / weights).read_bytes()


def test_an_interruption_before_the_first_checkpoint_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LemoTrainer, "compute_loss", interrupt)
    assert lemo(monkeypatch, "finetune", *common(place), "--output", str(tmp_path / "run")) == 130
    assert "no checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_eval_of_model_and_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((place / "run/summary.json").read_text())
    assert lemo(monkeypatch, "eval", *common(place), "--json") == 0
    base = json.loads(capsys.readouterr().out)
    adapter = ["--adapter", str(place / "run/adapter"), "--output", str(tmp_path / "eval.json")]
    assert lemo(monkeypatch, "eval", *common(place), *adapter, "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert base["loss"] == pytest.approx(summary["loss_before"], rel=1e-6)
    assert tuned["loss"] == pytest.approx(summary["loss_after"], rel=1e-6)
    assert len(tuned["by_position"]) == 3
    assert json.loads((tmp_path / "eval.json").read_text()) == tuned

    assert lemo(monkeypatch, "eval", *common(place)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"loss {base['loss']:.4f}, perplexity ")
    assert lines[1].startswith("  positions 64 to 127: loss ")


def test_report_writes_the_report_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lemo(monkeypatch, "report", str(place / "run")) == 0
    assert capsys.readouterr().out.strip() == f"report: {place / 'run/report.html'}"
    assert (place / "run/report.html").exists()


def test_bench_quality_runs_goes_on_and_is_reported(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"kind": "sft", "sources": [str(place / "data")], "heldout_share": 0.3, "heldout_sequences": 2}
    task |= {"max_tokens": 128, "min_tokens": 40, "completion_tokens": [8, 24]}
    study = {"task": task, "methods": [{"method": "labels-only"}], "seeds": [0], "timed_steps": 0, "device": "cpu"}
    study |= {"lora": {"r": 4}, "training": {"steps": 2, "learning_rate": 5e-3, "save_every": 0}}
    path, output = tmp_path / "study.yaml", tmp_path / "study"
    path.write_text(json.dumps(study))
    command = ["bench", "quality", "--config", str(path), "--model", str(place / "model"), "--output", str(output)]

    assert lemo(monkeypatch, *command, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"records": 2, "report": str(output / "report.html")}
    assert "2 of 2: labels-only default, seed 0, 2 steps" in err
    lines = (output / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["lora+ckpt", "labels-only"]

    assert lemo(monkeypatch, *command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert lemo(monkeypatch, *command, "--resume", "--set", "seeds=[0, 1]") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["4 records", f"report: {output / 'report.html'}"]
    assert "2 of 2: labels-only default, seed 1" in err
    assert (output / "records.jsonl").read_text().splitlines()[:1] == lines[:1]

    (output / "report.html").unlink()
    assert lemo(monkeypatch, "report", str(output)) == 0
    assert capsys.readouterr().out.strip() == f"report: {output / 'report.html'}"
    assert "labels-only" in (output / "report.html").read_text()


def test_bench_ops_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "ops.yaml", tmp_path / "ops"
    movement = {"width": 8, "lengths": [128], "keeps": [0.5], "block_size": 16}
    path.write_text(json.dumps({"movement": movement, "dtype": "float32", "repeats": 1, "device": "cpu"}))
    command = ["bench", "ops", "--config", str(path), "--output", str(output)]
    assert lemo(monkeypatch, *command, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"records": 11, "report": str(output / "report.html")}
    assert lemo(monkeypatch, *command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert lemo(monkeypatch, *command, "--resume", "--set", "movement.keeps=[0.5, 0.25]") == 0
    assert capsys.readouterr().out.splitlines()[0] == "22 records"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lemo(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("finetune", "eval", "bench", "report"))
