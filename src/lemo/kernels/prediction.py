"""A predictor's look at every token in one pass over the residual stream, in Triton: the branch's norm, the first
low-rank matrix with ReLU, and what a block's tokens have together.

A program takes a block. The norm's weight lies in the matrix, its scale is a factor on each row's products and comes
from sums over the same numbers, so that normalised inputs never exist. Attention's predictors get the mean and the
maximum of each number over the block, and another kernel takes a block's through two small matrices; an MLP's go on by
token, through two small matrices, to the block's mean.

N rows, D hidden size, n blocks, r numbers a token, m width of the second matrix, o of the third.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import power_of_2

_COLUMNS = 64
# Numbers of a tile of the second matrix.
_TILE = 4096


@dataclass(frozen=True)
class FirstLook:
    """The first matrices and the norm before them.

    Attributes:
        matrix: for inputs that are scaled but not shifted, in their dtype, [r, D].
        offset: what is added to the scaled products, fp32 [r].
        sums: fp32 [r], the matrix's rows summed, where the norm takes the mean away; else None.
        eps: the norm's.
    """

    matrix: Tensor
    offset: Tensor
    sums: Tensor | None
    eps: float


def pooled_look(hidden_ND: Tensor, look: FirstLook, first_row_n: Tensor, tokens_n: Tensor, block: int) -> Tensor:
    """Means, then maxima, of each block's r numbers, fp32 [n, 2·r].

    Args:
        hidden_ND: the residual stream, rows contiguous in memory.
        look: of all networks together, r at most 128.
        first_row_n, tokens_n: each block's rows, int64.
        block: most tokens of one, at most 128.
    """
    n, r = len(first_row_n), len(look.matrix)
    out = torch.empty(n, 2 * r, device=hidden_ND.device, dtype=torch.float32)
    _launch(hidden_ND, look, first_row_n, tokens_n, block, out, None, None)
    return out


def later_look(pooled: Tensor, places: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """`relu(relu(seen @ second) @ third)` of what is pooled beside the places, fp32 [n, o], columns contiguous.

    Args:
        pooled: of each block, fp32 [n, i].
        places: where it lies, fp32 [n, p].
        second, third: fp32 [i + p, m] and [m, o], contiguous.
    """
    (n, i), p, (m, o) = pooled.shape, places.shape[1], third.shape
    out = torch.empty(o, n, device=pooled.device, dtype=torch.float32)
    BI = power_of_2(i)
    launch(
        _later_look, (n,), pooled, places, second, third, out, n,
        I=i, P=p, M=m, O=o, BI=BI, BP=power_of_2(p), BM=min(power_of_2(m), max(1, _TILE // BI)), BO=power_of_2(o),
        num_warps=4,
    )  # fmt: skip
    return out.T


def mean_activity(
    hidden_ND: Tensor,
    look: FirstLook,
    second_rm: Tensor,
    third_m: Tensor,
    first_row_n: Tensor,
    tokens_n: Tensor,
    block: int,
) -> Tensor:
    """Mean over each block's tokens of relu(relu(low @ second) @ third), fp32 [n]; arguments as `pooled_look`'s."""
    out = torch.empty(len(first_row_n), device=hidden_ND.device, dtype=torch.float32)
    _launch(hidden_ND, look, first_row_n, tokens_n, block, out, second_rm.contiguous(), third_m.contiguous())
    return out


def _launch(
    hidden: Tensor,
    look: FirstLook,
    first_row: Tensor,
    tokens: Tensor,
    block: int,
    out: Tensor,
    second: Tensor | None,
    third: Tensor | None,
) -> None:
    r, D = look.matrix.shape
    m = 0 if second is None else second.shape[1]
    launch(
        _look, (len(first_row),), hidden, look.matrix, look.offset, look.sums, first_row, tokens, second, third, out,
        look.eps, hidden.stride(0),
        D=D, R=r, M=m, BB=max(16, power_of_2(block)), BR=max(16, power_of_2(r)),
        BM=max(16, power_of_2(m)), BK=_COLUMNS, CENTERED=look.sums is not None,
        ACTIVITY=second is not None, PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
        # With more stages, or with 4 warps for 128 rows, results are wrong on an H100 (Triton 3.6; docs/LOG.md).
        num_warps=8 if block > 64 else 4, num_stages=1,
    )  # fmt: skip


@triton.jit
def _look(
    X, FIRST, OFFSET, SUMS, ROW, TOKENS, SECOND, THIRD, OUT,
    eps, stride,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, CENTERED: tl.constexpr, ACTIVITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(TOKENS + n).to(tl.int32)
    i, j, k = tl.arange(0, BB), tl.arange(0, BR), tl.arange(0, BK)
    rows = X + (tl.load(ROW + n) + i)[:, None] * stride
    matrix = FIRST + j[:, None] * D
    there = (i < count)[:, None]
    products = tl.zeros([BB, BR], tl.float32)
    total, squares = tl.zeros([BB], tl.float32), tl.zeros([BB], tl.float32)
    for start in range(0, D, BK):
        d = start + k[None, :]
        x = tl.load(rows + d, mask=there & (d < D), other=0.0)
        w = tl.load(matrix + d, mask=(j < R)[:, None] & (d < D), other=0.0)
        products += tl.dot(x, tl.trans(w), input_precision=PRECISION)
        wide = x.to(tl.float32)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
    offset = tl.load(OFFSET + j, mask=j < R, other=0.0)
    if CENTERED:
        mean = total / D
        scale = 1 / tl.sqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)
        products -= mean[:, None] * tl.load(SUMS + j, mask=j < R, other=0.0)[None, :]
    else:
        scale = 1 / tl.sqrt(squares / D + eps)
    low = tl.where(there, tl.maximum(products * scale[:, None] + offset[None, :], 0.0), 0.0)
    if ACTIVITY:
        l = tl.arange(0, BM)
        second = tl.load(SECOND + j[:, None] * M + l[None, :], mask=(j < R)[:, None] & (l < M)[None, :], other=0.0)
        middle = tl.maximum(tl.dot(low.to(second.dtype), second, input_precision=PRECISION), 0.0)
        third = tl.load(THIRD + l, mask=l < M, other=0.0).to(tl.float32)
        active = tl.maximum(tl.sum(middle * third[None, :], 1), 0.0)
        tl.store(OUT + n, tl.sum(active, 0) / count)
    else:
        # Nothing is below zero, so rows that aren't there never win a maximum.
        where = OUT + n * 2 * R + j
        tl.store(where, tl.sum(low, 0) / count, mask=j < R)
        tl.store(where + R, tl.max(low, 0), mask=j < R)


@triton.jit
def _later_look(
    POOLED, PLACES, SECOND, THIRD, OUT, blocks,
    I: tl.constexpr, P: tl.constexpr, M: tl.constexpr, O: tl.constexpr,
    BI: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i, p, o = tl.arange(0, BI), tl.arange(0, BP), tl.arange(0, BO)
    seen = tl.load(POOLED + n * I + i, mask=i < I, other=0.0)
    place = tl.load(PLACES + n * P + p, mask=p < P, other=0.0)
    out = tl.zeros([BO], tl.float32)
    for start in range(0, M, BM):
        j = start + tl.arange(0, BM)
        of_seen = tl.load(SECOND + i[:, None] * M + j[None, :], mask=(i < I)[:, None] & (j < M)[None, :], other=0.0)
        of_place = tl.load(
            SECOND + (I + p)[:, None] * M + j[None, :], mask=(p < P)[:, None] & (j < M)[None, :], other=0.0
        )
        middle = tl.maximum(tl.sum(seen[:, None] * of_seen, 0) + tl.sum(place[:, None] * of_place, 0), 0.0)
        third = tl.load(THIRD + j[:, None] * O + o[None, :], mask=(j < M)[:, None] & (o < O)[None, :], other=0.0)
        out += tl.sum(middle[:, None] * third, 0)
    tl.store(OUT + o.to(tl.int64) * blocks + n, tl.maximum(out, 0.0), mask=o < O)
