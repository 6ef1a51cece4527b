"""Tiles of a few rows, read and written by Triton kernels; offsets are int64 (DESIGN 4.10)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Kernels compute powers of 2: scores are multiplied by this first.
LOG2_E = 1.4426950408889634


def power_of_2(n: int) -> int:
    """The least one that isn't below n, at least 1; triton's own function takes microseconds."""
    return 1 << max(n - 1, 0).bit_length()


def tiles_of(count: int, size: int) -> int:
    """Tiles of that size that cover so many."""
    return -(-count // size)


@triton.jit
def load_tile(P, rows, limit, stride_row, stride_d, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    where = P + rows.to(tl.int64)[:, None] * stride_row + d[None, :] * stride_d
    return tl.load(where, mask=(rows < limit)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(P, x, rows, limit, stride_row, stride_d, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    where = P + rows.to(tl.int64)[:, None] * stride_row + d[None, :] * stride_d
    tl.store(where, x.to(P.dtype.element_ty), mask=(rows < limit)[:, None] & (d < D)[None, :])
