"""Which implementation an op gets, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

LARGEST_HEAD = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger("lemo")


def attention_backend(q: Tensor, k: Tensor, v: Tensor, dropout: bool) -> str:
    """`triton` or `torch` for attention of selected rows; logged once for every reason."""
    reason = _reason_against(q, k, v, dropout)
    _note("torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against(q: Tensor, k: Tensor, v: Tensor, dropout: bool) -> str | None:
    if q.device.type != "cuda":
        return f"Triton kernels need a CUDA device, the tensors are on {q.device.type}"
    if not _has_triton():
        return "triton isn't installed"
    if dropout:
        return "the kernel has no attention dropout"
    if q.shape[-1] > LARGEST_HEAD or v.shape[-1] != q.shape[-1]:
        return f"the kernel takes one head size of at most {LARGEST_HEAD}, not {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype not in _DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        return f"the kernel takes one dtype of fp32, fp16 and bf16, not {q.dtype}, {k.dtype} and {v.dtype}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _note(backend: str, reason: str | None) -> None:
    _log.info("attention of selected rows: %s%s", backend, f" ({reason})" if reason else "")
