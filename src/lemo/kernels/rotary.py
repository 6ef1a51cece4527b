"""Rotation of queries and keys by their positions, in Triton: both in one pass, and its transpose for the backward.

As transformers writes it a rotation is seven passes over memory for each of the two, with copies of their halves. Here
a program takes a row, all of its heads; cos and sin are read at the row's place among all rows.

N rows, H and K heads, d head size, even.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import power_of_2


def rotate(
    q_NHd: Tensor, k_NKd: Tensor, cos_Td: Tensor, sin_Td: Tensor, rows_N: Tensor, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """`x * cos + (-x's second half, x's first half) * sin` of both, in their shapes and dtypes, contiguous.

    Args:
        q_NHd, k_NKd: numbers of a head contiguous.
        cos_Td, sin_Td: of all rows, contiguous.
        rows_N: int64, which rows these are.
        transposed: the transpose of that linear map, which takes the result's gradients to these.
    """
    N, H, d = q_NHd.shape
    K = k_NKd.shape[1]
    q_out = torch.empty(N, H, d, device=q_NHd.device, dtype=q_NHd.dtype)
    k_out = torch.empty(N, K, d, device=k_NKd.device, dtype=k_NKd.dtype)
    launch(
        _rotate, (N,), q_NHd, k_NKd, q_out, k_out, cos_Td, sin_Td, rows_N,
        q_NHd.stride(0), q_NHd.stride(1), k_NKd.stride(0), k_NKd.stride(1),
        H=H, K=K, HALF=d // 2, BH=power_of_2(H), BK=power_of_2(K),
        BD=power_of_2(d // 2), TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _rotate(
    Q, K_, Q_OUT, K_OUT, COS, SIN, ROWS, q_row, q_head, k_row, k_head,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    place = tl.load(ROWS + n).to(tl.int64) * 2 * HALF + d
    cos_1 = tl.load(COS + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(COS + place + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(SIN + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(SIN + place + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin_1, sin_2 = -sin_2, -sin_1
    _rotate_heads(Q + n * q_row, q_head, Q_OUT + n * 2 * H * HALF, cos_1, cos_2, sin_1, sin_2, H, HALF, BH, BD)
    _rotate_heads(K_ + n * k_row, k_head, K_OUT + n * 2 * K * HALF, cos_1, cos_2, sin_1, sin_2, K, HALF, BK, BD)


@triton.jit
def _rotate_heads(
    X, stride, OUT, cos_1, cos_2, sin_1, sin_2,
    H: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # A head's gradient may lie N rows from the next one's.
    h, d = tl.arange(0, BH)[:, None].to(tl.int64), tl.arange(0, BD)[None, :]
    here = (h < H) & (d < HALF)
    x_1 = tl.load(X + h * stride + d, mask=here, other=0.0).to(tl.float32)
    x_2 = tl.load(X + h * stride + d + HALF, mask=here, other=0.0).to(tl.float32)
    where = OUT + h * 2 * HALF + d
    tl.store(where, (x_1 * cos_1 - x_2 * sin_1).to(OUT.dtype.element_ty), mask=here)
    tl.store(where + HALF, (x_2 * cos_2 + x_1 * sin_2).to(OUT.dtype.element_ty), mask=here)
