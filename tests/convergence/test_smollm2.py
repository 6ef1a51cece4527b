"""The real model on real data at 1,024 tokens, 60 steps of ordinary LoRA and of mode `backward`: `make test-slow`.

About half an hour on two cores. One seed each, so the margins only tell working from broken; the spread over seeds is
in docs/quality.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lemo.bench.config import QualityConfig
from lemo.bench.quality import run_study
from lemo.bench.records import Record

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _two_threads(_reproducible: None) -> None:
    torch.set_num_threads(2)


def study(output: Path, task: dict[str, Any], learning_rate: float) -> tuple[Record, Record]:
    """The rows of `lora+ckpt` and of `lemo-backward` with default settings."""
    training = {"steps": 60, "learning_rate": learning_rate, "warmup_steps": 5, "scheduler": "cosine", "save_every": 0}
    values = {
        "task": {"max_tokens": 1024, "heldout_sequences": 12, **task},
        "methods": [{"method": "lemo-backward", "sparsity": {}}],
        "seeds": [0],
        "training": training,
        "timed_steps": 0,
        "device": "cpu",
        "output": str(output),
    }
    baseline, backward = run_study(QualityConfig.model_validate(values))
    assert (baseline.method, backward.method) == ("lora+ckpt", "lemo-backward")
    return baseline, backward


def test_backward_learns_what_lora_learns_of_long_prompts(tmp_path: Path) -> None:
    baseline, backward = study(
        tmp_path / "sft", {"kind": "sft", "min_tokens": 512, "completion_tokens": [64, 128]}, learning_rate=5e-4
    )
    assert baseline.loss_before is not None
    assert baseline.loss_after is not None
    # A share of less would be noise; ten steps of `make demo` win twice as much.
    assert baseline.loss_before - baseline.loss_after >= 0.02
    # Five points under the lowest of five seeds at 8K (docs/quality.md).
    assert backward.gain_retained is not None
    assert backward.gain_retained >= 0.9
    # Something must have been left out. Prompts are as short as 8 blocks here, of which labels hold up to 3.
    assert backward.keep is not None
    assert backward.keep < 0.8


def test_backward_learns_to_look_things_up(tmp_path: Path) -> None:
    task = {"kind": "retrieval", "lengths": [1024], "keys": 24, "questions": 8}
    baseline, backward = study(tmp_path / "retrieval", task, learning_rate=1e-3)
    # 12 sequences with 8 answers: one answer is 0.01.
    for row in (baseline, backward):
        assert row.accuracy_before is not None
        assert row.accuracy_after is not None
    # Learned in training, not known before.
    assert baseline.accuracy_before <= 0.3
    assert baseline.accuracy_after >= 0.9
    # Two standard deviations of the difference between two samples of 96 answers, 97% of them right.
    assert backward.accuracy_after >= baseline.accuracy_after - 0.05
