"""The real model on real data, 30 steps at 1,024 tokens: `make test-slow` (about twenty minutes)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemo.config import RunConfig
from lemo.config_io import load_config
from lemo.training.job import finetune
from lemo.training.summary import Summary

pytestmark = pytest.mark.slow


def run(folder: Path, sparsity: dict[str, object]) -> Summary:
    base = load_config().model_dump()
    base["sparsity"] = sparsity
    base["data"] |= {"max_tokens": 1024, "min_tokens": 1024, "completion_tokens": 128}
    base["training"] |= {"steps": 30, "save_every": 0, "learning_rate": 5e-4, "warmup_steps": 2}
    base["evaluation"] |= {"documents": 16, "sample_tokens": 0}
    base["device"] = "cpu"
    base["output"] = str(folder / str(sparsity["mode"]))
    return finetune(RunConfig.model_validate(base))


def test_backward_learns_nearly_what_dense_lora_learns(tmp_path: Path) -> None:
    dense = run(tmp_path, {"mode": "dense"})
    sparse = run(tmp_path, {"mode": "backward"})
    assert dense.loss_before == pytest.approx(sparse.loss_before, abs=1e-6)
    assert dense.loss_before is not None
    assert dense.loss_after is not None
    assert sparse.loss_after is not None
    gain = dense.loss_before - dense.loss_after
    assert gain >= 0.02
    # One seed: the quality lab measures spread; this catches a broken gradient.
    assert dense.loss_before - sparse.loss_after >= 0.8 * gain
    assert sparse.keep_mean < 0.8
    assert sparse.fidelity_mean is not None
    assert sparse.fidelity_mean >= 0.98
