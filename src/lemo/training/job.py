"""`finetune`: from a configuration to an adapter and its records. What can be refused is refused before any work.

Order: output directory, checkpoint (when resuming), model, data and its table, checks; then LoRA, sparsity, evaluation
before, training, evaluation after. The run directory is created only when everything has been checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

import lemo
from lemo.config import RunConfig
from lemo.config_io import save_resolved
from lemo.data import Collator, Loaded, load
from lemo.errors import UserError
from lemo.evaluation import EvaluationResult, Sample, evaluate, sample_completion
from lemo.models import get_runtime
from lemo.models.device import choose_device
from lemo.models.loading import load_model
from lemo.training import checkpoints, summary
from lemo.training.checks import check_labels_fit, check_length
from lemo.training.metrics import MetricsLog
from lemo.training.progress import StepDisplay
from lemo.training.storage import require_space, storage_errors, sync_directory, write_json
from lemo.training.summary import Summary
from lemo.training.trainer import LemoTrainer, training_arguments

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CONFIG = "config.yaml"
# What a run writes beside its adapter and checkpoints: configuration, metrics, summary, report.
_RUN_EXTRA = 4 * 2**20


def finetune(config: RunConfig, *, resume: bool = False) -> Summary:
    """Fine-tunes a model with LoRA while blocks of tokens are left out, and writes a run directory.

    Under torchrun each process trains on its share of every batch; only the first writes.

    Args:
        config: the run's. `config.output` must be absent or empty, unless `resume`.
        resume: go on from the newest checkpoint in `config.output`; every setting that decides the result must be as
            when it was written.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: anything the user can fix; the message says how. Existing files are never overwritten.
    """
    started = time.perf_counter()
    run = Path(config.output)
    checkpoint = checkpoints.newest(run) if resume else None
    if checkpoint is None and is_main_process():
        _refuse_used(run)
    console = Console(stderr=True, quiet=not is_main_process())

    device = choose_device(config.device)
    model, tokenizer = load_model(config.model, device)
    check_length(model, config)
    data = load(config.data, tokenizer, config.training.seed)
    console.print(data.report.render())
    check_labels_fit(data.train, config)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    identity = checkpoints.identity(config, fingerprint_model(model), fingerprint_data(data.train), processes)
    if checkpoint is not None:
        checkpoints.check_identity(checkpoint, identity)
    job = _Job(config, run, console, device, data, tokenizer, Collator.for_tokenizer(tokenizer))
    model = _prepare_model(model, config)
    if is_main_process():
        job.open_directory(model, checkpoint)

    try:
        before = job.evaluate_before(model)
        _train(job, model, identity, checkpoint)
        after = job.judge(model, "after")
    finally:
        lemo.restore(model)
    result = _summarise(job, before, after, processes, time.perf_counter() - started)
    if is_main_process():
        job.close_directory(model, result)
    return result


def is_main_process() -> bool:
    """Whether this process writes; under torchrun that is rank 0."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Judgement:
    """The dense model's held-out loss and completion at one moment; None where the configuration asks for none."""

    loss: EvaluationResult | None
    sample: Sample | None

    def to_dict(self) -> dict[str, Any]:
        """For `before.json`."""
        return {
            "loss": self.loss.to_dict() if self.loss else None,
            "sample": self.sample.to_dict() if self.sample else None,
        }
