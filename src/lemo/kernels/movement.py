"""Token movement without permutation, in Triton: rows of the residual stream are read and added to at their place.

The naive way to run a branch on some rows indexes them into a copy, normalises the copy, scatters the branch's output
into zeros of the stream's size, and adds those: of T·D numbers two temporaries and four passes, whatever is kept. Here
one kernel reads the kept rows where they lie and writes the branch's compact input, and one adds the branch's output
to the same rows; the backward kernels do the reverse. Nothing has T rows but the stream itself (paper section 5.1).

A program takes a tile of few rows, whole: one pass over memory. Arithmetic is fp32, offsets are int64 (DESIGN 4.10).
Rows are distinct, as a plan's are; a row named twice would be added to once.

T rows of the stream, N rows moved, D width.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import power_of_2, tiles_of

# Numbers of a tile: 8 KiB of bf16, so that each thread of four warps has 64 bytes on their way.
_TILE = 4096
# Programs that share the sums of a trained norm's gradients: two for each multiprocessor of an H100.
_SUMMING = 264


def gather_rows(x_TD: Tensor, rows_N: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x[rows]` in another dtype, [N, D].

    Args:
        x_TD: contiguous rows.
        rows_N: int64.
        dtype: of the result; x's by default.
    """
    out_ND = torch.empty(len(rows_N), x_TD.shape[1], device=x_TD.device, dtype=dtype or x_TD.dtype)
    _launch(_gather_rows, len(rows_N), x_TD.shape[1], x_TD, rows_N, out_ND, x_TD.stride(0))
    return out_ND


def gather_norm(
    x_TD: Tensor,
    rows_N: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    centered: bool,
    dtype: torch.dtype,
    keep_rows: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The norm of `x[rows]`, [N, D], and with `keep_rows` these rows themselves, [N, D] in x's dtype.

    Args:
        x_TD: contiguous rows.
        rows_N: int64; None for all of x.
        weight_D, bias_D: the norm's, any floating dtype; bias None for none.
        eps: added to the variance.
        centered: LayerNorm; otherwise RMS-norm.
        dtype: of the normalised rows.
        keep_rows: for the backward.
    """
    D = x_TD.shape[1]
    N = x_TD.shape[0] if rows_N is None else len(rows_N)
    out_ND = torch.empty(N, D, device=x_TD.device, dtype=dtype)
    kept_ND = torch.empty(N, D, device=x_TD.device, dtype=x_TD.dtype) if keep_rows else None
    _launch(
        _gather_norm, N, D, x_TD, rows_N, weight_D, bias_D, out_ND, kept_ND, x_TD.stride(0), eps, CENTERED=centered
    )  # fmt: skip
    return out_ND, kept_ND


def add_rows_(x_TD: Tensor, rows_N: Tensor, y_ND: Tensor) -> None:
    """`x[rows] += y` in place.

    Args:
        x_TD: contiguous rows.
        rows_N: int64, distinct.
        y_ND: any floating dtype, contiguous rows.
    """
    _launch(_add_rows, len(rows_N), x_TD.shape[1], x_TD, rows_N, y_ND, x_TD.stride(0), y_ND.stride(0))


def add_norm_gradient_(
    grad_TD: Tensor | None,
    rows_N: Tensor | None,
    grad_y_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    centered: bool,
    parameters: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward of `gather_norm`: adds the gradient of the rows to `grad[rows]`, in place.

    Args:
        grad_TD: gradient of the stream, contiguous rows; None where the stream has none.
        rows_N: int64, distinct.
        grad_y_ND: gradient of the normalised rows, contiguous rows.
        x_ND: the rows, as `gather_norm` kept them.
        weight_D: the norm's.
        eps, centered: as above.
        parameters: whether the norm trains.

    Returns:
        Gradients of weight and bias, fp32 [D] each, with `parameters`; else None, None.
    """
    N, D = x_ND.shape
    sums = None
    each = 1
    if parameters:
        tiles = max(1, tiles_of(N, _rows(D)))
        # A power of two, so that few kernels are compiled.
        each = power_of_2(tiles_of(tiles, _SUMMING))
        sums = torch.zeros(2, tiles_of(tiles, each), D, device=x_ND.device, dtype=torch.float32)
    _launch(
        _add_norm_gradient, N, D, grad_y_ND, grad_TD, rows_N, x_ND, weight_D, sums,
        grad_TD.stride(0) if grad_TD is not None else 0, grad_y_ND.stride(0),
        sums.stride(0) if sums is not None else 0, eps,
        each=each, CENTERED=centered, PARAMETERS=parameters, EACH=each,
    )  # fmt: skip
    if sums is None:
        return None, None
    weight, bias = sums.sum(1)
    return weight, bias


def _rows(D: int) -> int:
    """Rows of a tile."""
    return max(1, _TILE // power_of_2(D))


def _launch(kernel, N: int, D: int, *arguments, each: int = 1, **constants) -> None:
    """Runs a kernel over all tiles of N rows, `each` of them a program."""
    BD, R = power_of_2(D), _rows(D)
    launch(
        kernel, (tiles_of(N, R * each),), *arguments, N,
        D=D, BD=BD, R=R, num_warps=min(16, max(4, BD // 1024)), **constants,
    )  # fmt: skip


@triton.jit
def _tile(index, N, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    """A tile's rows in compact tensors, int64 [R], columns [1, BD], and which of its numbers there are."""
    n = index.to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, BD)[None, :]
    return n, d, (n < N)[:, None] & (d < D)


@triton.jit
def _places(ROWS, n, N):
    """The tile's rows in the stream."""
    rows = n
    if ROWS is not None:
        rows = tl.load(ROWS + n, mask=n < N, other=0).to(tl.int64)
    return rows


@triton.jit
def _standard(x, here, eps, D: tl.constexpr, CENTERED: tl.constexpr):
    """Standardised rows, and the reciprocal of their standard deviation [R, 1]."""
    if CENTERED:
        x = tl.where(here, x - tl.sum(x, 1)[:, None] / D, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(x * x, 1)[:, None] / D + eps)
    return x * reciprocal, reciprocal


@triton.jit
def _gather_rows(X, ROWS, OUT, stride, N, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    n, d, here = _tile(tl.program_id(0), N, D, BD, R)
    x = tl.load(X + _places(ROWS, n, N)[:, None] * stride + d, mask=here, other=0.0)
    tl.store(OUT + n[:, None] * D + d, x.to(OUT.dtype.element_ty), mask=here)


@triton.jit
def _gather_norm(
    X, ROWS, WEIGHT, BIAS, OUT, KEPT, stride, eps, N,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    n, d, here = _tile(tl.program_id(0), N, D, BD, R)
    x = tl.load(X + _places(ROWS, n, N)[:, None] * stride + d, mask=here, other=0.0)
    if KEPT is not None:
        tl.store(KEPT + n[:, None] * D + d, x, mask=here)
    y, _ = _standard(x.to(tl.float32), here, eps, D, CENTERED)
    y *= tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(OUT + n[:, None] * D + d, y.to(OUT.dtype.element_ty), mask=here)


@triton.jit
def _add_rows(X, ROWS, Y, stride, stride_y, N, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    n, d, here = _tile(tl.program_id(0), N, D, BD, R)
    where = X + _places(ROWS, n, N)[:, None] * stride + d
    y = tl.load(Y + n[:, None] * stride_y + d, mask=here, other=0.0).to(tl.float32)
    x = tl.load(where, mask=here, other=0.0).to(tl.float32)
    tl.store(where, (x + y).to(X.dtype.element_ty), mask=here)


@triton.jit
def _add_norm_gradient(
    GRAD_Y, GRAD, ROWS, X, WEIGHT, SUMS, stride, stride_y, stride_sums, eps, N,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    CENTERED: tl.constexpr, PARAMETERS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """With standardised rows s and g = grad_y · weight: (g - s mean(g s)) / σ, and centered where the norm is."""
    weight = tl.load(WEIGHT + tl.arange(0, BD)[None, :], mask=tl.arange(0, BD)[None, :] < D, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BD], tl.float32)
    of_bias = tl.zeros([BD], tl.float32)
    for part in range(EACH):
        n, d, here = _tile(tl.program_id(0) * EACH + part, N, D, BD, R)
        x = tl.load(X + n[:, None] * D + d, mask=here, other=0.0).to(tl.float32)
        grad_y = tl.load(GRAD_Y + n[:, None] * stride_y + d, mask=here, other=0.0).to(tl.float32)
        if GRAD is not None:
            # Asked for before the sums that its change waits for.
            where = GRAD + _places(ROWS, n, N)[:, None] * stride + d
            grad = tl.load(where, mask=here, other=0.0)
        s, reciprocal = _standard(x, here, eps, D, CENTERED)
        if PARAMETERS:
            of_weight += tl.sum(grad_y * s, 0)
            of_bias += tl.sum(grad_y, 0)
        if GRAD is not None:
            g = grad_y * weight
            change = g - s * (tl.sum(g * s, 1)[:, None] / D)
            if CENTERED:
                change -= tl.sum(g, 1)[:, None] / D
            tl.store(where, (grad.to(tl.float32) + change * reciprocal).to(GRAD.dtype.element_ty), mask=here)
    if PARAMETERS:
        d = tl.arange(0, BD)
        where = SUMS + tl.program_id(0).to(tl.int64) * D + d
        tl.store(where, of_weight, mask=d < D)
        tl.store(where + stride_sums, of_bias, mask=d < D)
