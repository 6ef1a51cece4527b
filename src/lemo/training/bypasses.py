"""Bypasses that train, in a checkpoint: the dense model has no use for them, a resumed run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lemo.errors import UserError
from lemo.models import get_runtime
from lemo.models.calibration import bypasses_of, tensors_of

FILE = "lemo_bypasses.safetensors"


def keep_bypasses(model: Any) -> None:
    """Promises a sparsified model that its checkpoints will hold its bypasses, of which it warns otherwise."""
    runtime = get_runtime(model)
    if runtime is not None:
        runtime.bypasses_kept = True


def save_bypasses(model: Any, checkpoint: Path) -> None:
    """Writes a sparsified model's bypasses into a checkpoint's directory, if they train."""
    runtime = get_runtime(model)
    if runtime is not None and runtime.config.train_bypass:
        save_file(tensors_of({}, runtime.bypasses), checkpoint / FILE)


def load_bypasses(model: Any, checkpoint: Path) -> None:
    """Puts what `save_bypasses` wrote into a model that has the same bypasses, if they train.

    Raises:
        UserError: the checkpoint has none, damaged ones, or those of another model or calibration.
    """
    runtime = get_runtime(model)
    if runtime is None or not runtime.config.train_bypass:
        return
    try:
        stored = bypasses_of(load_file(checkpoint / FILE))
        if stored.keys() != runtime.bypasses.keys():
            raise ValueError("it has others")
        for key, bypass in stored.items():
            runtime.bypasses[key].load_state_dict(bypass.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint / FILE} doesn't hold this model's bypasses ({' '.join(str(error).split())}); resume from "
            "a checkpoint with the same calibration, in the run's own output_dir, that was written with "
            "lemo.training.SparsityCallback, or train anew"
        ) from error
