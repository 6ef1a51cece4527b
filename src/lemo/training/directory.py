"""The run directory: never overwritten, opened when everything has been checked, closed with adapter and summary."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lemo.config import RunConfig
from lemo.config_io import SAVED_CONFIG, save_resolved
from lemo.errors import UserError
from lemo.training import checkpoints
from lemo.training.metrics import MetricsLog
from lemo.training.storage import require_space, storage_errors, sync_directory, sync_file, write_json
from lemo.training.summary import FILE, Summary

ADAPTER = "adapter"
_ASIDE = ".tmp-adapter"
# Configuration, metrics, summary and report.
_RECORDS_BYTES = 4 * 2**20


def is_main_process() -> bool:
    """Whether this process writes; under torchrun that is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def refuse_used(run: Path, resumed: str | None = None) -> None:
    """Refuses a directory that holds anything.

    Args:
        run: the directory.
        resumed: what --resume would do, for the message; None looks for a checkpoint of a run.

    Raises:
        UserError: it does, or it isn't a directory.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"--output {run} is a file; choose another --output")
    if run.is_dir() and any(run.iterdir()):
        if resumed is None and checkpoints.steps_of(run):
            resumed = "go on from its newest checkpoint"
        go_on = f"add --resume to {resumed}, or " if resumed else ""
        raise UserError(f"--output {run} is not empty, and nothing is overwritten; {go_on}choose another --output")


def open_run(run: Path, config: RunConfig, model: Any, checkpoint: Path | None) -> None:
    """Creates the directory, or puts it back to where its checkpoint was written.

    Raises:
        UserError: it can't be written, or there is no room for the adapter.
    """
    with storage_errors("the run directory", run, "choose another --output"):
        run.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(run)
        shutil.rmtree(run / _ASIDE, ignore_errors=True)
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        require_space(run, trained + _RECORDS_BYTES, "the adapter and the records")
        if checkpoint is None:
            save_resolved(config, run / SAVED_CONFIG)
        else:
            MetricsLog(run).truncate(checkpoints.step_of(checkpoint))


def close_run(run: Path, model: Any, result: Summary) -> None:
    """Writes the adapter (whole or not at all), then the summary.

    Raises:
        UserError: there is no room.
    """
    with storage_errors("the adapter", run, "free some space, then go on with --resume"):
        aside = run / _ASIDE
        try:
            # lemo trains no embeddings; PEFT's `auto` would ask the hub about the base model.
            model.save_pretrained(str(aside), save_embedding_layers=False)
            for path in aside.iterdir():
                sync_file(path)
            # A finished run that is resumed writes the same adapter again.
            shutil.rmtree(run / ADAPTER, ignore_errors=True)
            aside.rename(run / ADAPTER)
            sync_directory(run)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        write_json(run / FILE, result.to_dict())
