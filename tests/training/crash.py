"""Runs that kill themselves with SIGKILL at a chosen moment, in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lemo.config import RunConfig
from lemo.training import checkpoints, finetune
from lemo.training.metrics import MetricsLog
from lemo.training.trainer import LemoTrainer


def killed_run(config: RunConfig, moment: str, step: int, *, resume: bool = False) -> None:
    """Runs until `moment` of `step` and asserts that it died there."""
    # Forks from a server that has imported torch but used none of it: fast, and without inherited threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lemo.training.job"])
    process = context.Process(target=_run, args=(config, moment, step, resume))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL, f"exit code {process.exitcode}, wanted death {moment} {step}"


def _run(config: RunConfig, moment: str, step: int, resume: bool) -> None:
    torch.set_num_threads(1)
    _arm(moment, step)
    finetune(config, resume=resume)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: str, step: int) -> None:
    """Replaces what runs at that moment by something that kills the process."""

    def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        setattr(owner, name, wrapper(getattr(owner, name)))

    def at_step(original: Any) -> Any:
        def replaced(trainer: LemoTrainer, *args: Any, **kwargs: Any) -> Any:
            # During step N the Trainer has counted N - 1.
            if trainer.state.global_step == step - 1:
                _die()
            return original(trainer, *args, **kwargs)

        return replaced

    def torn_line(original: Any) -> Any:
        def replaced(log: MetricsLog, record: dict[str, Any]) -> None:
            if record["step"] == step:
                with log.path.open("a") as file:
                    file.write(f'{{"step": {step}, "lo')
                    file.flush()
                    _die()
            original(log, record)

        return replaced

    def at_save(original: Any) -> Any:
        def replaced(trainer: LemoTrainer, *args: Any, **kwargs: Any) -> Any:
            return _die() if trainer.state.global_step == step else original(trainer, *args, **kwargs)

        return replaced

    def at_publish(original: Any) -> Any:
        def replaced(aside: Path, run: Path, saved: int) -> Any:
            return _die() if saved == step else original(aside, run, saved)

        return replaced

    def in_rmtree(original: Any) -> Any:
        def replaced(directory: Path, *args: Any, **kwargs: Any) -> None:
            if Path(directory).name.startswith(checkpoints.ASIDE):
                (Path(directory) / "optimizer.pt").unlink()
                _die()
            original(directory, *args, **kwargs)

        return replaced

    match moment:
        case "in a step":
            wrap(LemoTrainer, "compute_loss", at_step)
        case "in a metrics line":
            wrap(MetricsLog, "append", torn_line)
        case "before its save":
            wrap(LemoTrainer, "_save_checkpoint", at_save)
        case "in a save":
            # The adapter and the optimizer are there by then, scheduler and random states aren't.
            wrap(LemoTrainer, "_save_rng_state", at_save)
        case "before the rename":
            wrap(checkpoints, "publish", at_publish)
        case "in the rotation":
            wrap(shutil, "rmtree", in_rmtree)
        case _:
            raise ValueError(moment)
