"""Tiles of block-sparse attention, read and written by its Triton kernels: of queries by lanes, of keys by rows.

A tile has `BM` lanes. Lane i is head i % HEADS of row i // HEADS. Addresses count from the tile's first row and head.
Where the hardware copies (TMA), a tile whose rows all exist comes by a descriptor [heads, rows, d].
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lanes_of(queries, HEADS: tl.constexpr, BM: tl.constexpr):
    """Row after the tile's first and head of each lane, and whether it is one of the queries from there on."""
    lane = tl.arange(0, BM)
    row = lane // HEADS
    live = row < queries
    if BM % HEADS:
        live = live & (row < BM // HEADS)
    return row, lane % HEADS, live


@triton.jit
def offsets_of(row, head, stride_row, stride_head, HEADS: tl.constexpr):
    """Of lanes, from the tile's first row and head; rows lie within 2³¹ of each other, heads anywhere."""
    offset = row * stride_row
    if HEADS > 1:
        offset = offset + head.to(tl.int64) * stride_head
    return offset


@triton.jit
def places_of(P, offset, stride_d, BD: tl.constexpr):
    return P + (offset[:, None] + tl.arange(0, BD)[None, :] * stride_d)


@triton.jit
def load_lanes(P, offset, live, stride_d, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """A tile of rows at these offsets; without the check all of them exist."""
    where = places_of(P, offset, stride_d, BD)
    if CHECKED:
        x = tl.load(where, mask=live[:, None] & (tl.arange(0, BD) < D)[None, :], other=0.0)
    elif D < BD:
        x = tl.load(where, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        x = tl.load(where)
    return x


@triton.jit
def fetch_tile(DESCRIPTOR, head, first, ROWS: tl.constexpr, BD: tl.constexpr):
    """Rows of one head that follow each other, all of which exist, by one copy of the hardware's."""
    return tl.reshape(DESCRIPTOR.load([head.to(tl.int32), first.to(tl.int32), 0]), [ROWS, BD])


@triton.jit
def load_keys(
    P, DESCRIPTOR, kv, first, limit, stride_row, stride_d,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys or values of head kv, which begins at P, from `first` on."""
    if TMA and not MASKED:
        x = fetch_tile(DESCRIPTOR, kv, first, BN, BD)
    else:
        n = tl.arange(0, BN)
        x = load_lanes(P + first.to(tl.int64) * stride_row, n * stride_row, n < limit - first, stride_d, D, BD, MASKED)
    return x


@triton.jit
def store_lanes(P, x, offset, live, stride_d, D: tl.constexpr, BD: tl.constexpr):
    mask = live[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(places_of(P, offset, stride_d, BD), x.to(P.dtype.element_ty), mask=mask)


@triton.jit
def sees(POSITION, LOWEST, row, live, keys, CUT: tl.constexpr):
    """Lanes by keys; lanes that are no queries see nothing."""
    seen = keys[None, :] <= tl.load(POSITION + row, mask=live, other=-1)[:, None]
    if CUT:
        seen = seen & (keys[None, :] >= tl.load(LOWEST + row, mask=live, other=0)[:, None])
    return seen
