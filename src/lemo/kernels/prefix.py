"""Attention of selected queries with most of the work done by the vendor's library.

Kept queries ascend, so all queries of a chunk see every key before the chunk's first one. Chunk × these keys is a
rectangle without a mask: plain attention, which cuDNN runs at about 600 TFLOP/s on an H100, where our kernels reach
300 to 450 (docs/LOG.md). Without a mask rows are interchangeable too, so the query heads that share a key head are
folded into rows. What is left of each query's keys, a strip along the diagonal, goes to our kernels, whose bounds then
begin where the rectangle ends.

Forward: the two parts' outputs are joined by their softmax denominators. Backward: a part's gradient needs the whole
softmax's denominator and output and nothing else of the other part, so each backward runs on its own and the gradients
add up; those of keys and values in fp32, since many chunks add to one key.

Rejected: FlexAttention (slower than the library, and compiled); one call for all queries with a mask (no fast backend
takes one). A library plans anew for each shape (0.1 s), so chunks have one size, and prefixes are cut to a grain that
grows with them.

N queries, M keys, H query heads, K key/value heads, d head size; logarithms of denominators are to base 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lemo.kernels import reference
from lemo.kernels.attention import attention_backward, attention_forward

# Rows of all heads in a chunk: 256 tiles of 128, two waves on the 132 multiprocessors of an H100.
_HEAD_ROWS = 32768
# A rectangle must be worth its launches, and a new shape its plan: at least 2^37 operations, half a millisecond saved.
# That is 8,192 keys for heads of 128 numbers, 16,384 for heads of 64.
_LEAST_KEYS = 8192
_LEAST_FLOP = 2**37
# A prefix is cut to 2,048 keys, or a sixteenth of its length.
_GRAIN = 2048
_LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class Rectangle:
    """Queries [row, row_end) all see the keys [key, key_end), and more from key_end on."""

    row: int
    row_end: int
    key: int
    key_end: int


def worthwhile_keys(head_size: int) -> int:
    """The fewest keys a rectangle of the default chunk must have to be worth it.

    Args:
        head_size: d. The number of heads doesn't matter: a chunk has the same rows of all heads together.
    """
    return max(_LEAST_KEYS, -(-_LEAST_FLOP // (4 * _HEAD_ROWS * head_size)))


def cut_rectangles(
    documents: Sequence[tuple[int, int]],
    cu_seqlens: Sequence[int],
    rows: Tensor,
    heads: int,
    *,
    head_rows: int = _HEAD_ROWS,
    least_keys: int = _LEAST_KEYS,
    grain: int = _GRAIN,
) -> tuple[Rectangle, ...]:
    """The rectangles worth a call of the library, ascending; cut from each document's end, where most is seen.

    Args:
        documents: (first, end) rows of each document; all of them are keys.
        cu_seqlens: where each document's queries begin and end.
        rows: int64 [N], the queries' rows, on the CPU.
        heads: H.
        head_rows: rows of all heads in a chunk.
        least_keys: the fewest keys of a rectangle.
        grain: least grain of its keys.
    """
    chunk = max(1, head_rows // heads)
    found: list[Rectangle] = []
    for (first, _), (begin, end) in zip(documents, pairwise(cu_seqlens), strict=True):
        mine: list[Rectangle] = []
        while end - chunk >= begin:
            # The chunk's first query sees itself besides: no query is left without a key in the strip.
            seen = int(rows[end - chunk]) - first
            step = max(grain, 1 << max(0, (seen // 16).bit_length() - 1))
            width = seen // step * step
            if width < least_keys:
                break
            mine.append(Rectangle(end - chunk, end, first, first + width))
            end -= chunk
        found += reversed(mine)
    return tuple(found)


@dataclass(frozen=True)
class Done:
    """A forward, as its backward takes it.

    Attributes:
        out: [N, H, d].
        lse: denominators, fp32 [H, N].
        strip_lo: first key of each query's strip, int32 [N].
        states: what the library's backward wants of each rectangle's forward.
    """

    out: Tensor
    lse: Tensor
    strip_lo: Tensor
    states: tuple[Any, ...]


def forward(
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    lo_N: Tensor,
    hi_N: Tensor,
    scale: float,
    rectangles: Sequence[Rectangle],
) -> Done:
    """Softmax attention of query n over the keys lo[n] ... hi[n], as `lemo.kernels.attention` computes it.

    Args:
        q_HNd, k_KMd, v_KMd, lo_N, hi_N, scale: as there.
        rectangles: of `cut_rectangles`; a rectangle's keys must begin at its queries' lo.
    """
    strip_lo = lo_N.clone()
    for r in rectangles:
        strip_lo[r.row : r.row_end] = r.key_end
    out, lse = attention_forward(q_HNd, k_KMd, v_KMd, strip_lo, hi_N, scale)
    library = _library(q_HNd)
    states = []
    for r in rectangles:
        rows, keys = slice(r.row, r.row_end), slice(r.key, r.key_end)
        part, part_lse, state = library.forward(_folded(q_HNd[:, rows], k_KMd), k_KMd[:, keys], v_KMd[:, keys], scale)
        part_lse_Hn = part_lse.view(lse.shape[0], -1) / _LN_2
        whole_Hn = torch.logaddexp2(lse[:, rows], part_lse_Hn)
        ours, theirs = ((x - whole_Hn).exp2().T[..., None] for x in (lse[:, rows], part_lse_Hn))
        out[rows] = out[rows] * ours + _unfolded(part, q_HNd.shape[0]) * theirs
        lse[:, rows] = whole_Hn
        states.append(state)
    return Done(out, lse, strip_lo, tuple(states))


def backward(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    done: Done,
    hi_N: Tensor,
    scale: float,
    rectangles: Sequence[Rectangle],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [H, N, d], keys and values [K, M, d], in their dtypes; keys that nobody sees get zeros."""
    out, lse = done.out, done.lse
    dq, dk, dv = attention_backward(grad_NHd, q_HNd, k_KMd, v_KMd, out, lse, done.strip_lo, hi_N, scale)
    if not rectangles:
        return dq, dk, dv
    wide = torch.promote_types(k_KMd.dtype, torch.float32)
    dk, dv = dk.to(wide), dv.to(wide)
    library = _library(q_HNd)
    for r, state in zip(rectangles, done.states, strict=True):
        rows, keys = slice(r.row, r.row_end), slice(r.key, r.key_end)
        q, grad, o = (
            _folded(x, k_KMd) for x in (q_HNd[:, rows], grad_NHd[rows].transpose(0, 1), out[rows].transpose(0, 1))
        )
        natural = (lse[:, rows] * _LN_2).view(k_KMd.shape[0], -1)
        pq, pk, pv = library.backward(grad, q, k_KMd[:, keys], v_KMd[:, keys], o, natural, state, scale)
        dq[:, rows] += pq.reshape(dq[:, rows].shape)
        dk[:, keys] += pk
        dv[:, keys] += pv
    return dq, dk.to(k_KMd.dtype), dv.to(v_KMd.dtype)


def _folded(x_Hnd: Tensor, k_KMd: Tensor) -> Tensor:
    """Heads that share a key head become rows, [K, H/K·n, d], contiguous."""
    K, d = k_KMd.shape[0], k_KMd.shape[2]
    return x_Hnd.reshape(K, -1, d).contiguous()


def _unfolded(x_Krd: Tensor, heads: int) -> Tensor:
    """[n, H, d]."""
    return x_Krd.reshape(heads, -1, x_Krd.shape[-1]).transpose(0, 1)


class _Cudnn:
    """cuDNN's attention without a mask, as torch offers it. Denominators are natural logarithms, [K, rows]."""

    @staticmethod
    def forward(q_Krd: Tensor, k_Kmd: Tensor, v_Kmd: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
        out, lse, *state = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_Krd[None], k_Kmd[None], v_Kmd[None], None, True, 0.0, False, False, scale=scale
        )
        return out[0], lse.view(lse.shape[1], -1), state[:6]

    @staticmethod
    def backward(
        grad_Krd: Tensor,
        q_Krd: Tensor,
        k_Kmd: Tensor,
        v_Kmd: Tensor,
        out_Krd: Tensor,
        lse_Kr: Tensor,
        state: Any,
        scale: float,
    ) -> tuple[Tensor, ...]:
        cum_q, cum_k, max_q, max_k, philox_seed, philox_offset = state
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(x[None] for x in (grad_Krd, q_Krd, k_Kmd, v_Kmd, out_Krd, lse_Kr[..., None])),
            philox_seed, philox_offset, None, cum_q, cum_k, max_q, max_k, 0.0, False, scale=scale,
        )  # fmt: skip
        return tuple(x[0] for x in grads)


def _library(q: Tensor) -> Any:
    """cuDNN; on a CPU, where nothing is fast, the plain twin."""
    return _Cudnn if q.is_cuda else reference.PlainAttention
