"""Tiles of a few rows, read and written by Triton kernels, and attention's steps on them, which two files of kernels
share; offsets of rows are int64 (DESIGN 4.10).

Shapes: q, do, dq [BM, BD], k, v, dk, dv [BN, BD]; m, l, lse, delta [BM]. Scores are to base 2.
"""

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


@triton.jit
def softmax_step(s, v, m, l, acc, PRECISION: tl.constexpr):
    """(m, l, acc), a row's maximum, sum and weighted values, after scores `s` of more keys."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen no key yet has no maximum.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)
    return m_new, l, acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def query_step(p, do, delta, k, v, dq, PRECISION: tl.constexpr):
    """dq after some keys with probabilities `p`, [BM, BN]."""
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def key_step(p, q, do, delta, v, dk, dv, PRECISION: tl.constexpr):
    """(dk, dv) after some queries with probabilities `p`, [BN, BM]."""
    dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return dk + tl.dot(ds.to(q.dtype), q, input_precision=PRECISION), dv
