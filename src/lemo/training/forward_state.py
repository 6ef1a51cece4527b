"""What mode `forward` trains beside the adapter, in a checkpoint: the dense model has no use for it, a resumed run has.

Bypasses that train, and the thresholds that follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lemo.errors import UserError
from lemo.models import get_runtime
from lemo.models.calibration import bypasses_of, tensors_of
from lemo.models.runtime import Runtime

FILE = "lemo_forward.safetensors"
_SCALE = ".threshold_scale"


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
        # The next pass would do so.
        runtime.move_thresholds()
        for (layer, branch), scale in runtime.following.scales.items():
            tensors[f"{layer}.{branch}{_SCALE}"] = torch.tensor(scale, dtype=torch.float64)
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
        tensors = load_file(checkpoint / FILE)
        _take(runtime, tensors)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint / FILE} doesn't hold this model's bypasses and thresholds ({' '.join(str(error).split())}); "
            "resume from a checkpoint with the same calibration, in the run's own output_dir, that was written with "
            "lemo.training.SparsityCallback, or train anew"
        ) from error


def _changes(runtime: Runtime) -> bool:
    return bool(runtime.config.train_bypass) or runtime.following is not None


def _take(runtime: Runtime, tensors: dict[str, Tensor]) -> None:
    scales = {name.removesuffix(_SCALE): x for name, x in tensors.items() if name.endswith(_SCALE)}
    stored = bypasses_of({name: x for name, x in tensors.items() if not name.endswith(_SCALE)})
    if stored.keys() != (runtime.bypasses.keys() if runtime.config.train_bypass else set()):
        raise ValueError("it has others")
    for key, bypass in stored.items():
        runtime.bypasses[key].load_state_dict(bypass.state_dict())
    if runtime.following is None:
        if scales:
            raise ValueError("it has thresholds")
        return
    found = {(int(name.split(".")[0]), name.split(".")[1]): float(x) for name, x in scales.items()}
    if not found.keys() <= runtime.following.calibrated.keys():
        raise ValueError("it has other thresholds")
    runtime.following.scales = found
    runtime.take_thresholds(runtime.following)
