"""Which implementation an op gets, and why.

`LEMO_KERNELS=torch` in the environment takes plain torch for everything: slow, to check results against.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import NoReturn

import torch
from torch import Tensor

LARGEST_HEAD = 256
WIDEST_ROW = 32768
SCORED_BLOCKS = (16, 32, 64, 128)
SCORED_BYTES = 512
# Sampled block-pair scores: strips of so many tokens, of which all are looked at while a query's is less than
# NEAR_STRIPS after a key's, then every second, and half as many at each doubling of that distance, down to every
# MOST_STRIDE-th (a power of two).
STRIP = 128
NEAR_STRIPS = 16
MOST_STRIDE = 16
LARGEST_PREDICTED_BLOCK = 128
MOST_NUMBERS = 128
LARGEST_NORMED_HEAD = 128
MOST_RANKED = 2**14
LISTED_BLOCKS = (16, 32, 64, 128)
LISTED_BYTES = 2**15
HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *HALF)
_log = logging.getLogger("lemo")


def plain_torch() -> bool:
    """Whether the user asked for plain torch, by `LEMO_KERNELS=torch`.

    Raises:
        ValueError: the variable says something else than `torch` or `auto`.
    """
    wanted = os.environ.get("LEMO_KERNELS", "auto")
    if wanted not in ("auto", "torch"):
        raise ValueError(f"LEMO_KERNELS is {wanted!r}; it may be 'auto' (the default) or 'torch'")
    return wanted == "torch"


def attention_backend(q: Tensor, k: Tensor, v: Tensor, dropout: bool) -> str:
    """`triton` or `torch` for attention of selected rows; logged once for every reason."""
    reason = _reason_against(q, k, v, dropout)
    _note("attention of selected rows", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against(q: Tensor, k: Tensor, v: Tensor, dropout: bool) -> str | None:
    if reason := _reason_against_any(q):
        return reason
    if dropout:
        return "the kernel has no attention dropout"
    if q.shape[-1] > LARGEST_HEAD or v.shape[-1] != q.shape[-1]:
        return f"the kernel takes one head size of at most {LARGEST_HEAD}, not {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype not in _DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        return f"the kernel takes one dtype of fp32, fp16 and bf16, not {q.dtype}, {k.dtype} and {v.dtype}"
    return None


def check_listed_block(key_block: int, device: torch.device) -> None:
    """Raises ValueError where lists of such key blocks would go the slow way on a GPU that nobody asked for."""
    if device.type == "cuda" and key_block not in LISTED_BLOCKS and not plain_torch():
        _refuse_slow_lists(_listed_blocks(key_block))


def _refuse_slow_lists(reason: str) -> NoReturn:
    raise ValueError(
        f"attend would go through plain torch on this GPU, which takes longer than dense attention: {reason}. Change "
        "sparsity.attend.block (wide heads need small blocks) or leave attend out; LEMO_KERNELS=torch in the "
        "environment takes plain torch for everything"
    )


def block_sparse_backend(q: Tensor, k: Tensor, v: Tensor, key_block: int) -> str:
    """`triton` or `torch` for attention by lists of key blocks; logged once for every reason.

    Raises:
        ValueError: on a GPU the kernel can't do it: torch's way takes longer than dense attention.
    """
    reason = _reason_against_lists(q, k, v, key_block)
    if reason and q.device.type == "cuda" and not plain_torch():
        _refuse_slow_lists(reason)
    _note("block-sparse attention", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_lists(q: Tensor, k: Tensor, v: Tensor, key_block: int) -> str | None:
    if key_block not in LISTED_BLOCKS:
        return _listed_blocks(key_block)
    most = min(SCORED_BYTES, LISTED_BYTES // key_block)
    if q.shape[-1] * q.element_size() > most:
        return (
            f"with blocks of {key_block} the kernel takes heads of {most} bytes a row, not {q.shape[-1]} of {q.dtype}"
        )
    return _reason_against(q, k, v, dropout=False)


def _listed_blocks(key_block: int) -> str:
    return f"the kernel takes blocks of {', '.join(map(str, LISTED_BLOCKS))} keys, not {key_block}"


def scores_backend(q: Tensor, k: Tensor, block_size: int) -> str:
    """`triton` or `torch` for block-pair scores; logged once for every reason."""
    reason = _reason_against_scores(q, k, block_size)
    _note("block-pair scores", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_scores(q: Tensor, k: Tensor, block_size: int) -> str | None:
    if block_size not in SCORED_BLOCKS:
        return f"the kernel takes blocks of {', '.join(map(str, SCORED_BLOCKS))} tokens, not {block_size}"
    if q.shape[-1] * q.element_size() > SCORED_BYTES:
        return f"the kernel takes heads of {SCORED_BYTES} bytes a row, not {q.shape[-1]} of {q.dtype}"
    return _reason_against(q, k, k, dropout=False)


def movement_backend(*tensors: Tensor) -> str:
    """`triton` or `torch` for moving rows of the first tensor; logged once for every reason.

    Args:
        tensors: the stream [T, D], and whatever floating tensors are read or written with its rows.
    """
    reason = _reason_against_movement(tensors)
    _note("movement of selected rows", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_movement(tensors: tuple[Tensor, ...]) -> str | None:
    stream = tensors[0]
    if reason := _reason_against_any(stream):
        return reason
    if stream.shape[-1] > WIDEST_ROW:
        return f"the kernels take rows of at most {WIDEST_ROW} numbers, not {stream.shape[-1]}"
    odd = [x.dtype for x in tensors if x.dtype not in _DTYPES]
    return f"the kernels take fp32, fp16 and bf16, not {', '.join(sorted(set(map(str, odd))))}" if odd else None


def gated_backend(gate: Tensor, up: Tensor) -> str:
    """`triton` or `torch` for SiLU times a projection; logged once for every reason."""
    reason = _reason_against_any(gate)
    if reason is None and (gate.dtype not in HALF or up.dtype != gate.dtype):
        # In fp32 numbers stay bitwise the unmodified model's.
        reason = f"the kernel takes one dtype of fp16 and bf16, not {gate.dtype} and {up.dtype}"
    _note("SiLU times a projection", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def rectified_backend(x: Tensor) -> str:
    """`triton` or `torch` for a ReLU that keeps bits; logged once for every reason."""
    reason = _reason_against_any(x) or _reason_against_dtype(x)
    _note("ReLU", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def rotary_backend(q: Tensor, k: Tensor, cos: Tensor, reason: str | None) -> str:
    """`triton` or `torch` for the rotation of queries and keys; logged once for every reason.

    Args:
        q, k: before the rotation, [..., d].
        cos: of the rotation, [..., d].
        reason: what else speaks against the kernel, None for nothing.
    """
    reason = _reason_against_any(q) or reason or _reason_against_rotation(q, k, cos)
    _note("rotation of queries and keys", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_rotation(q: Tensor, k: Tensor, cos: Tensor) -> str | None:
    if q.dtype not in HALF or k.dtype != q.dtype:
        # In fp32 numbers stay bitwise the unmodified model's.
        return f"the kernel takes one dtype of fp16 and bf16, not {q.dtype} and {k.dtype}"
    if cos.dtype != q.dtype:
        return f"cos and sin are {cos.dtype}, which widens queries of {q.dtype}"
    if q.shape[-1] % 2 or q.shape[-1] > LARGEST_HEAD or cos.shape[-1] != q.shape[-1]:
        return f"the kernel rotates whole heads of at most {LARGEST_HEAD}, not {cos.shape[-1]} of {q.shape[-1]} numbers"
    return None


def loss_backend(x: Tensor, plain: bool) -> str:
    """`triton` or `torch` for the loss of a head's rows; logged once for every reason.

    Args:
        x: the logits, or what goes into the head.
        plain: whether the head's backward doesn't need its output.
    """
    reason = _reason_against_any(x)
    if reason is None and not plain:
        reason = "the head is no plain nn.Linear, or somebody listens to it"
    reason = reason or _reason_against_dtype(x)
    _note("cross-entropy", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def prediction_backend(x: Tensor, block_size: int, numbers: int, norm_known: bool) -> str:
    """`triton` or `torch` for an MLP predictor's look at every token; logged once for every reason."""
    reason = _reason_against_prediction(x, block_size, numbers, norm_known)
    _note("prediction of MLPs' informativeness", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_prediction(x: Tensor, block_size: int, numbers: int, norm_known: bool) -> str | None:
    if reason := _reason_against_projection(x, norm_known):
        return reason
    if block_size > LARGEST_PREDICTED_BLOCK:
        return f"the kernel takes blocks of at most {LARGEST_PREDICTED_BLOCK} tokens, not {block_size}"
    if numbers > MOST_NUMBERS:
        return f"the kernel takes at most {MOST_NUMBERS} rows of the first matrix, not {numbers}"
    return None


def projection_backend(x: Tensor, norm_known: bool) -> str:
    """`triton` or `torch` for score heads' queries and keys of every token; logged once for every reason."""
    reason = _reason_against_projection(x, norm_known)
    _note("score heads' queries and keys", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_projection(x: Tensor, norm_known: bool) -> str | None:
    if reason := _reason_against_any(x):
        return reason
    if not norm_known:
        return "the kernel knows RMS norms and LayerNorm, before the branch"
    return _reason_against_dtype(x)


def head_norm_backend(size: int, query_eps: float, key_eps: float) -> str:
    """`triton` or `torch` for the RMS norm of score heads' queries and keys that Triton projects; logged once for every
    reason.

    Args:
        size: of a head.
        query_eps, key_eps: the norms'.
    """
    reason = None
    if size > LARGEST_NORMED_HEAD or size & (size - 1):
        reason = f"the kernel takes head sizes that are powers of 2 up to {LARGEST_NORMED_HEAD}, not {size}"
    elif query_eps != key_eps:
        reason = f"the kernel takes one eps for queries and keys, not {query_eps} and {key_eps}"
    _note("norm of score heads' queries and keys", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def ranking_backend(score: Tensor, longest: int) -> str:
    """`triton` or `torch` for ranking blocks by their scores; logged once for every reason.

    Args:
        score: of the blocks.
        longest: blocks of the longest document.
    """
    reason = _reason_against_any(score)
    if reason is None and longest > MOST_RANKED:
        reason = f"the kernel takes documents of at most {MOST_RANKED} blocks, not {longest}"
    if reason is None and score.dtype != torch.float32:
        reason = f"the kernel takes scores of fp32, not {score.dtype}"
    _note("ranking of blocks", "torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def _reason_against_any(x: Tensor) -> str | None:
    """What keeps every Triton kernel from running."""
    if plain_torch():
        return "LEMO_KERNELS=torch asks for it"
    if x.device.type != "cuda":
        return f"Triton kernels need a CUDA device, the tensors are on {x.device.type}"
    return None if _has_triton() else "triton isn't installed"


def _reason_against_dtype(x: Tensor) -> str | None:
    return None if x.dtype in _DTYPES else f"the kernel takes fp32, fp16 and bf16, not {x.dtype}"


def prefix_by_library(q: Tensor) -> bool:
    """Whether rectangles of the attention of selected rows go to cuDNN; logged once for every reason."""
    reason = _reason_against_library(q)
    _note("keys that many selected rows see", "triton" if reason else "cudnn", reason)
    return reason is None


def _reason_against_library(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it was measured faster on Hopper GPUs only"
    if q.dtype not in HALF:
        return f"cuDNN takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN takes head sizes up to 128 in steps of 8, not {q.shape[-1]}"
    if not torch.backends.cuda.cudnn_sdp_enabled() or not torch.backends.cudnn.is_available():
        return "cuDNN's attention is switched off"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _note(what: str, backend: str, reason: str | None) -> None:
    _log.info("%s: %s%s", what, backend, f" ({reason})" if reason else "")
