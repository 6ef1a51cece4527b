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
# The calibrated threshold, and the logarithm of the present one over it.
_THRESHOLD = ".threshold"


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
        for key in runtime.following.followed:
            pair = runtime.following.calibrated[key], runtime.following.scales.get(key, 0.0)
            tensors[f"{key[0]}.{key[1]}{_THRESHOLD}"] = torch.tensor(pair, dtype=torch.float64)
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
    pairs = {name.removesuffix(_THRESHOLD): x.tolist() for name, x in tensors.items() if name.endswith(_THRESHOLD)}
    stored = bypasses_of({name: x for name, x in tensors.items() if not name.endswith(_THRESHOLD)})
    if stored.keys() != (runtime.bypasses.keys() if runtime.config.train_bypass else set()):
        raise ValueError("it has others")
    following = runtime.following
    mine = {} if following is None else {f"{key[0]}.{key[1]}": key for key in following.followed}
    calibrated = {name: following.calibrated[key] for name, key in mine.items()} if following is not None else {}
    if {name: pair[0] for name, pair in pairs.items()} != calibrated:
        raise ValueError("it has other thresholds")
    for key, bypass in stored.items():
        runtime.bypasses[key].load_state_dict(bypass.state_dict())
    if following is not None:
        following.scales = {mine[name]: pair[1] for name, pair in pairs.items()}
        following.take_seen()
        runtime.take_thresholds(following)
