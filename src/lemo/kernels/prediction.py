"""An MLP predictor's look at every token in one pass over the residual stream, in Triton: the branch's norm, three
low-rank matrices with ReLU, and the mean over each block's tokens.

A program takes a block. The norm's weight lies in the first matrix, its scale is a factor on each row's products and
comes from sums over the same numbers, so that normalised inputs never exist.

N rows, D hidden size, n blocks, r numbers a token, m width of the second matrix.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.projection import FirstLook
from lemo.kernels.tiles import power_of_2

_COLUMNS = 64


def mean_activity(
    hidden_ND: Tensor,
    look: FirstLook,
    second_rm: Tensor,
    third_m: Tensor,
    first_row_n: Tensor,
    tokens_n: Tensor,
    block: int,
) -> Tensor:
    """Mean over each block's tokens of relu(relu(low @ second) @ third), fp32 [n].

    Args:
        hidden_ND: the residual stream, rows contiguous in memory.
        look: of r at most 128, which makes `low` of a token.
        second_rm, third_m: in its dtype.
        first_row_n, tokens_n: each block's rows, int64.
        block: most tokens of one, at most 128.
    """
    (r, D), m = look.matrix.shape, second_rm.shape[1]
    out = torch.empty(len(first_row_n), device=hidden_ND.device, dtype=torch.float32)
    launch(
        _look, (len(first_row_n),), hidden_ND, look.matrix, look.offset, look.sums, first_row_n, tokens_n,
        second_rm.contiguous(), third_m.contiguous(), out, look.eps, hidden_ND.stride(0),
        D=D, R=r, M=m, BB=max(16, power_of_2(block)), BR=max(16, power_of_2(r)),
        BM=max(16, power_of_2(m)), BK=_COLUMNS, CENTERED=look.sums is not None,
        PRECISION="ieee" if hidden_ND.dtype == torch.float32 else "tf32",
        # With more stages, or with 4 warps for 128 rows, results are wrong on an H100 (Triton 3.6; docs/LOG.md).
        num_warps=8 if block > 64 else 4, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def _look(
    X, FIRST, OFFSET, SUMS, ROW, TOKENS, SECOND, THIRD, OUT,
    eps, stride,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, CENTERED: tl.constexpr, PRECISION: tl.constexpr,
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
    l = tl.arange(0, BM)
    second = tl.load(SECOND + j[:, None] * M + l[None, :], mask=(j < R)[:, None] & (l < M)[None, :], other=0.0)
    middle = tl.maximum(tl.dot(low.to(second.dtype), second, input_precision=PRECISION), 0.0)
    third = tl.load(THIRD + l, mask=l < M, other=0.0).to(tl.float32)
    active = tl.maximum(tl.sum(middle * third[None, :], 1), 0.0)
    tl.store(OUT + n, tl.sum(active, 0) / count)
