"""Norms that are recognised: transformers' RMS norms, run by torch's fused kernel while a sparse layer runs; and, for
kernels that normalise rows as they read them (`lemo.kernels.movement`), torch's LayerNorm too.

As transformers writes it a norm copies its input to fp32, squares it and scales it, and autograd keeps such copies: 1
GiB each at 64K tokens of width 4,096, where keys and values of all rows are rebuilt. torch's kernel reads and writes
once, stores one number a row, and rounds once. In half precision on a GPU only; elsewhere, and for any other norm, the
module itself runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.kernels.dispatch import HALF
from lemo.models.frozen import unwatched
from lemo.types import NormWeights

_log = logging.getLogger("lemo")

# weight * x / sqrt(mean(x²) + variance_epsilon), all of one text.
_KNOWN = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_DEVICES = ("cuda",)
# torch's kernel computes a row's offset in 32 bits (pytorch issue 181555), silently wrong past 2³² numbers.
_MOST = 2**31


def fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What to run in place of a known norm's `forward`; None for any other module."""
    return functools.partial(_forward, module) if _is_rms(module) else None


def norm_weights(module: Any) -> NormWeights | None:
    """What a kernel needs to compute a known norm by itself.

    None, said once in the log, for any other, or one that somebody listens to.
    """
    if reason := _reason_against(module):
        _note(reason)
        return None
    if _is_rms(module):
        return NormWeights(module.weight, None, module.variance_epsilon, centered=False)
    return NormWeights(module.weight, module.bias, module.eps, centered=True)


def _is_rms(module: nn.Module) -> bool:
    kind: Any = type(module)
    return _is_rms_class(kind)


@functools.cache
def _is_rms_class(kind: type) -> bool:
    return kind.__name__ in _KNOWN and kind.__module__.startswith("transformers.models.")


def _reason_against(module: Any) -> str | None:
    if not _is_rms(module) and type(module) is not nn.LayerNorm:
        return f"{_name(module)} isn't a norm that is known"
    weight = module.weight
    if weight is None or weight.dim() != 1:
        return f"a {_name(module)} without a weight a column"
    # `fused` gives an instance its own `forward`, which computes the same.
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "func", None) is not _forward:
        return f"a {_name(module)} whose forward was replaced"
    return None if unwatched(module) else f"hooks on a {_name(module)}"


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@functools.cache
def _note(reason: str) -> None:
    _log.info("rows aren't normalised as they are read: %s", reason)


def _forward(norm: Any, hidden: Tensor) -> Tensor:
    weight = norm.weight
    fits = hidden.device.type in _DEVICES and hidden.dtype in HALF and weight.dtype == hidden.dtype
    if not fits or hidden.numel() >= _MOST:
        return type(norm).forward(norm, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
