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

from lemo.config import RunConfig
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


@pytest.mark.parametrize("mode", ["backward", "dense"])
def test_two_ranks_equal_accumulation_of_two(place: Path, mode: str) -> None:
    one, two = place / f"one-{mode}", place / f"two-{mode}"
    finetune(settings(place, one.name, f"sparsity.mode={mode}", "training.accumulation=2"))
    finetune_in_ranks(settings(place, two.name, f"sparsity.mode={mode}"), 2)

    for name, value in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], value, rtol=0, atol=1e-5)
    assert [line["step"] for line in lines(two)] == [1, 2]
    for single, double in zip(lines(one), lines(two), strict=True):
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
        assert double["keep_mean"] == pytest.approx(single["keep_mean"], rel=1e-5)
        assert (double["tokens"], double["labelled_tokens"]) == (single["tokens"], single["labelled_tokens"])
    assert json.loads((two / "summary.json").read_text())["processes"] == 2

    files = {path.name for path in (two / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files
    names = {path.name for path in two.iterdir()}
    assert names == {"adapter", "checkpoint-1", "checkpoint-2", "config.yaml", "metrics.jsonl", "summary.json"}


def test_two_ranks_resume_bitwise(place: Path) -> None:
    draws = ("sparsity.policy=segments", "lora.dropout=0.2", "training.steps=3")
    finetune_in_ranks(settings(place, "whole", *draws), 2)
    shutil.copytree(place / "whole", place / "cut")
    for name in ("checkpoint-3", "adapter"):
        shutil.rmtree(place / "cut" / name)
    finetune_in_ranks(settings(place, "cut", *draws), 2, resume=True)
    for name, value in adapter(place / "whole").items():
        assert torch.equal(adapter(place / "cut")[name], value)
    assert [line["loss"] for line in lines(place / "cut")] == [line["loss"] for line in lines(place / "whole")]
