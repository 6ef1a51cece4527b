"""Two processes (gloo) learn what one process learns, and write once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import finetune_in_ranks
from safetensors.torch import load_file

from lemo.calibration.config import CalibrationConfig
from lemo.calibration.job import calibrate
from lemo.config import ModelConfig, RunConfig
from lemo.selection.predictor_config import PredictorConfig
from lemo.training import finetune
from tiny_run import run_settings, save_model, save_texts

STEPS = (
    "training.steps=2",
    "training.save_every=1",
    "training.warmup_steps=0",
    "evaluation.documents=1",
    "evaluation.sample_tokens=0",
)
# Sequences of different lengths, all tokens labelled: a mean of the ranks' means would be another loss.
LABELS = ("data.completion_tokens=0", "training.max_grad_norm=1e9")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    save_model(root / "model")
    save_texts(root / "data")
    return root


def settings(place: Path, name: str, *overrides: str) -> RunConfig:
    return run_settings(place / "model", place / "data", place / name, *LABELS, *STEPS, *overrides)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def calibrated(place: Path) -> tuple[str, ...]:
    """Settings of mode `forward` with a small calibration, whose thresholds follow."""
    found = calibrate(
        CalibrationConfig(
            model=ModelConfig(name=str(place / "model")),
            data=settings(place, "unused").data,
            block_size=16,
            keep=0.6,
            dense_share=0.0,
            fit_sequences=4,
            judge_sequences=2,
            predictor=PredictorConfig(steps=8, head_steps=2, widths=(8, 8)),
            bypass_rank=2,
            device="cpu",
            output=str(place / "calibration"),
        )
    )
    assert any(0 < keep < 1 for branch in found.facts.branches.values() for keep in branch.keep)
    return "sparsity.mode=forward", f"sparsity.calibration={place / 'calibration'}"


def thresholds(run: Path) -> dict[str, torch.Tensor]:
    """Of the second step, where something follows."""
    file = run / "checkpoint-2/lemo_forward.safetensors"
    found = load_file(file) if file.exists() else {}
    return {name: pair for name, pair in found.items() if name.endswith(".threshold")}


@pytest.mark.parametrize("mode", ["backward", "dense", "forward"])
def test_two_ranks_equal_accumulation_of_two(place: Path, mode: str, calibrated: tuple[str, ...]) -> None:
    one, two = place / f"one-{mode}", place / f"two-{mode}"
    chosen = calibrated if mode == "forward" else (f"sparsity.mode={mode}",)
    finetune(settings(place, one.name, *chosen, "training.accumulation=2"))
    finetune_in_ranks(settings(place, two.name, *chosen), 2)

    for name, value in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], value, rtol=0, atol=1e-5)
    assert [line["step"] for line in lines(two)] == [1, 2]
    for single, double in zip(lines(one), lines(two), strict=True):
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
        assert double["keep_mean"] == pytest.approx(single["keep_mean"], rel=1e-5)
        assert (double["tokens"], double["labelled_tokens"]) == (single["tokens"], single["labelled_tokens"])
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    assert thresholds(one).keys() == thresholds(two).keys()
    assert bool(thresholds(one)) is (mode == "forward")
    # Two passes' sum is the same in either order.
    assert all(torch.equal(thresholds(two)[name], pair) for name, pair in thresholds(one).items())

    files = {path.name for path in (two / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files
    names = {path.name for path in two.iterdir()}
    assert names == {"adapter", "checkpoint-1", "checkpoint-2", "config.yaml", "metrics.jsonl", "summary.json"}


@pytest.mark.parametrize("mode", ["segments", "forward"])
def test_two_ranks_resume_bitwise(mode: str, place: Path, calibrated: tuple[str, ...]) -> None:
    chosen = calibrated if mode == "forward" else ("sparsity.policy=segments",)
    draws = ("lora.dropout=0.2", "training.steps=3", *chosen)
    whole, cut = place / f"whole-{mode}", place / f"cut-{mode}"
    finetune_in_ranks(settings(place, whole.name, *draws), 2)
    shutil.copytree(whole, cut)
    for name in ("checkpoint-3", "adapter"):
        shutil.rmtree(cut / name)
    finetune_in_ranks(settings(place, cut.name, *draws), 2, resume=True)
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(cut)[name], value)
    assert [line["loss"] for line in lines(cut)] == [line["loss"] for line in lines(whole)]
    ends = [run / "checkpoint-3/lemo_forward.safetensors" for run in (whole, cut)]
    assert all(end.exists() is (mode == "forward") for end in ends)
    if mode == "forward":
        first, second = map(load_file, ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
