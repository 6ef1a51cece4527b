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


def prefix_by_library(q: Tensor) -> bool:
    """Whether rectangles of the attention of selected rows go to cuDNN; logged once for every reason."""
    reason = _reason_against_library(q)
    _note_prefix("Triton" if reason else "cuDNN", reason)
    return reason is None


def _reason_against_library(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it was measured faster on Hopper GPUs only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"cuDNN takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN takes head sizes up to 128 in steps of 8, not {q.shape[-1]}"
    if not torch.backends.cuda.cudnn_sdp_enabled() or not torch.backends.cudnn.is_available():
        return "cuDNN's attention is switched off"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return None


@functools.cache
def _note_prefix(backend: str, reason: str | None) -> None:
    _log.info("keys that many selected rows see: %s%s", backend, f" ({reason})" if reason else "")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _note(backend: str, reason: str | None) -> None:
    _log.info("attention of selected rows: %s%s", backend, f" ({reason})" if reason else "")
