"""What mode `forward` trains beside the adapter, in a checkpoint: the dense model has no use for it, a resumed run has.

Bypasses that train, and the thresholds that follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lemo.errors import UserError
from lemo.models import get_runtime
from lemo.models.calibration import bypasses_of, tensors_of
from lemo.models.runtime import Runtime
from lemo.selection.following import SUFFIX

FILE = "lemo_forward.safetensors"


def keep_state(model: Any) -> None:
    """Promises a sparsified model that its checkpoints will hold this, of which it warns otherwise."""
    runtime = get_runtime(model)
    if runtime is not None:
        runtime.bypasses_kept = True


def save_state(model: Any, checkpoint: Path) -> None:
    """Writes a sparsified model's bypasses that train, and thresholds that follow, into a checkpoint's directory."""
    runtime = get_runtime(model)
    if runtime is None or not _changes(runtime):
        return
    tensors = tensors_of({}, runtime.bypasses) if runtime.config.train_bypass else {}
    if runtime.following is not None:
        tensors |= runtime.following.tensors()
    save_file(tensors, checkpoint / FILE)


def load_state(model: Any, checkpoint: Path) -> None:
    """Puts what `save_state` wrote into a model with the same calibration.

    Raises:
        UserError: the checkpoint has none of it, or it is damaged, or of another model or calibration.
    """
    runtime = get_runtime(model)
    if runtime is None or not _changes(runtime):
        return
    try:
        _take(runtime, load_file(checkpoint / FILE))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint / FILE} doesn't hold this model's bypasses and thresholds ({' '.join(str(error).split())}); "
            "resume from a checkpoint with the same calibration, in the run's own output_dir, that was written with "
            "lemo.training.SparsityCallback, or train anew"
        ) from error


def _changes(runtime: Runtime) -> bool:
    return bool(runtime.config.train_bypass) or runtime.following is not None


def _take(runtime: Runtime, tensors: dict[str, Tensor]) -> None:
    thresholds = {name: x for name, x in tensors.items() if name.endswith(SUFFIX)}
    stored = bypasses_of({name: x for name, x in tensors.items() if name not in thresholds})
    if stored.keys() != (runtime.bypasses.keys() if runtime.config.train_bypass else set()):
        raise ValueError("it has others")
    if runtime.following is not None:
        runtime.following.load(thresholds)
        runtime.take_thresholds()
    elif thresholds:
        raise ValueError("it has thresholds")
    for key, bypass in stored.items():
        runtime.bypasses[key].load_state_dict(bypass.state_dict())
