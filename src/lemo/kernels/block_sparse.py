"""Attention in which each block of queries sees the key blocks of its list, forward and backward, in Triton.

A program takes a tile of queries of one block (`lemo.kernels.block_lists`) and goes through the block's list; only the
last entries, those inside the query block itself, need a mask (where a sliding window cuts, all do). Gradients of keys
and values: a program takes the keys of a block and goes through the tiles of queries that see it, those that most see
first; sums have one order, so results repeat bit by bit.

A tile has `BM` lanes. Lane i is head i % HEADS of row i // HEADS: of all rows, one head's lie side by side; where few
of a block are kept, the heads that share a key head fill the tile. Where lanes lie from a tile's first is the same for
all tiles, so that a loop adds one number: addresses by lane were two thirds of its instructions.

N queries, M keys, H query heads, K key/value heads, G = H/K, d head size. FlashAttention-2's algorithm, as in
`lemo.kernels.attention`; logarithms of softmax denominators are to base 2.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.block_lists import BlockLists, RowTiles
from lemo.kernels.launches import Launch, Launches, launches_for
from lemo.kernels.tiles import LOG2_E, key_step, load_tile, query_step, softmax_step, store_tile


@dataclass(frozen=True, eq=False)
class Queries:
    """Which queries attend.

    Attributes:
        lists: what they see.
        host_rows: their rows, int64 [N], ascending, on the CPU; None for all M rows.
    """

    lists: BlockLists
    host_rows: Tensor | None

    def shape(self, group: int, launch: Launch) -> tuple[int, int]:
        """(lanes, heads) of a tile: one head where a block's rows fill it, else a group's if it has so many lanes."""
        grid, lanes = self.lists.grid, launch.lanes
        if self.host_rows is None and grid.longest >= lanes:
            return lanes, 1
        if self.host_rows is not None and len(self.host_rows) * group <= len(grid.query_first) * lanes // 2:
            # A block has few queries left.
            lanes = max(16, lanes // 2)
        return lanes, group if group <= lanes else 1


def block_sparse_forward(
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    queries: Queries,
    scale: float,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its block's list up to itself.

    Args:
        q_HNd, k_KMd, v_KMd: one dtype, any strides; d at most 256.
        queries: their rows and lists; key blocks of 16 to 128 tokens, a power of two.
        scale: factor on q·k.
        launches: how the kernels run; None for `launches_for`'s.

    Returns:
        Output [N, H, d], contiguous, in the inputs' dtype, 0 for queries of padding; logarithm (base 2) of each
        softmax's denominator, fp32 [H, N].
    """
    H, N, d = q_HNd.shape
    K = k_KMd.shape[0]
    new = torch.zeros if queries.lists.grid.padded else torch.empty
    out = new(N, H, d, device=q_HNd.device, dtype=q_HNd.dtype)
    lse = new(H, N, device=q_HNd.device, dtype=torch.float32)
    launch = (launches or _launches(q_HNd, queries.lists)).forward
    constants, tiles = _by_queries(q_HNd, K, queries, launch)
    if len(tiles.block):
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            _forward[(len(tiles.block) * (H // K // constants["HEADS"]), K)](
                q_HNd, k_KMd, v_KMd, out, lse, *_of_tiles(tiles), *_of_lists(queries.lists),
                scale * LOG2_E, N,
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), out.stride(1), out.stride(0),
                **constants,
            )  # fmt: skip
    return out, lse


def block_sparse_backward(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    out_NHd: Tensor,
    lse_HN: Tensor,
    queries: Queries,
    scale: float,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [H, N, d], keys and values [K, M, d], in their dtypes; keys that nobody sees get zeros."""
    lists = queries.lists
    launches = launches or _launches(q_HNd, lists)
    grad_NHd = grad_NHd.contiguous()
    dq, delta = query_gradient(grad_NHd, q_HNd, k_KMd, v_KMd, out_NHd, lse_HN, queries, scale, launches.queries)
    dk, dv = key_gradients(grad_NHd, q_HNd, k_KMd, v_KMd, lse_HN, delta, queries, scale, launches.keys)
    return dq, dk, dv


def query_gradient(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    out_NHd: Tensor,
    lse_HN: Tensor,
    queries: Queries,
    scale: float,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """Gradient of queries [H, N, d], and the rows' products of output and gradient, fp32 [H, N]."""
    H, N, _ = q_HNd.shape
    K = k_KMd.shape[0]
    new = torch.zeros if queries.lists.grid.padded else torch.empty
    delta = new(H, N, device=q_HNd.device, dtype=torch.float32)
    dq = new(q_HNd.shape, device=q_HNd.device, dtype=q_HNd.dtype)
    constants, tiles = _by_queries(q_HNd, K, queries, launch)
    if len(tiles.block):
        with torch.cuda.device_of(q_HNd):
            _backward_queries[(len(tiles.block) * (H // K // constants["HEADS"]), K)](
                q_HNd, k_KMd, v_KMd, out_NHd, grad_NHd, lse_HN, delta, dq, *_of_tiles(tiles), *_of_lists(queries.lists),
                scale * LOG2_E, scale, N,
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0), *dq.stride(),
                **constants,
            )  # fmt: skip
    return dq, delta


def key_gradients(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    lse_HN: Tensor,
    delta_HN: Tensor,
    queries: Queries,
    scale: float,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, [K, M, d] each; `delta_HN` is `query_gradient`'s."""
    K, N = k_KMd.shape[0], q_HNd.shape[1]
    lists, grid = queries.lists, queries.lists.grid
    constants, tiles = _by_queries(q_HNd, K, queries, launch)
    if queries.host_rows is None:
        # Every query block stands for as many tiles as the longest has.
        seen_by, first, end = lists.turned, grid.here.query_first, grid.here.query_end
        rows = constants["BM"] // constants["HEADS"]
        chunks, full = triton.cdiv(grid.longest, rows), rows * constants["HEADS"] == constants["BM"]
        full = full and grid.longest % rows == 0
    else:
        seen_by, first, end, chunks, full = lists.spread(tiles), tiles.first, tiles.end, 1, False
    new = torch.zeros if grid.padded else torch.empty
    dk, dv = (new(x.shape, device=x.device, dtype=x.dtype) for x in (k_KMd, v_KMd))
    with torch.cuda.device_of(q_HNd):
        _backward_keys[(K * len(grid.key_first) * constants["PARTS"],)](
            q_HNd, k_KMd, v_KMd, grad_NHd, lse_HN, delta_HN, dk, dv, *_rows_of(tiles), first, end,
            seen_by.seers, seen_by.start, _head_stride(seen_by.start), seen_by.own,
            seen_by.order, _head_stride(seen_by.order), grid.here.key_first, grid.here.key_end,
            scale * LOG2_E, scale, N, K,
            *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0), *dk.stride(),
            **constants,
            CHUNKS=chunks, FULL=full, BY_QUERIES=launch.by_queries,
        )  # fmt: skip
    return dk, dv


def _launches(q_HNd: Tensor, lists: BlockLists) -> Launches:
    return launches_for(q_HNd.shape[-1] * q_HNd.element_size(), lists.grid.key_block, q_HNd.device)


def _by_queries(q_HNd: Tensor, K: int, queries: Queries, launch: Launch) -> tuple[dict[str, Any], RowTiles]:
    """A kernel's constants, and the tiles that these make of the queries."""
    H, d, grid = q_HNd.shape[0], q_HNd.shape[-1], queries.lists.grid
    (lanes, heads), keys = queries.shape(H // K, launch), min(launch.keys, grid.key_block)
    constants = {
        "GROUP": H // K,
        "HEADS": heads,
        "D": d,
        "BD": max(16, triton.next_power_of_2(d)),
        "BM": lanes,
        "BN": keys,
        "PARTS": grid.key_block // keys,
        "CUT": grid.lowest is not None,
        # Tensor cores round fp32 to 10 bits of mantissa; fp32 is for those who want it exact.
        "PRECISION": "ieee" if q_HNd.dtype == torch.float32 else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    return constants, grid.tiles(queries.host_rows, lanes // heads)


def _rows_of(tiles: RowTiles) -> tuple[Tensor, Tensor]:
    return tiles.position, tiles.position if tiles.lowest is None else tiles.lowest


def _of_tiles(tiles: RowTiles) -> tuple[Tensor, ...]:
    return *_rows_of(tiles), tiles.block, tiles.first, tiles.end


def _of_lists(lists: BlockLists) -> tuple[Tensor | int, ...]:
    here = lists.grid.here
    return lists.entries, here.start, _head_stride(here.start), here.count, here.tail, here.query_end


def _head_stride(table: Tensor) -> int:
    """From one key head's line to the next; 0 where heads share one."""
    return table.stride(0) if table.shape[0] > 1 else 0


@triton.jit
def _lanes(END, tile, first, HEADS: tl.constexpr, BM: tl.constexpr):
    """Row after the tile's first and head of each lane, and whether it is a query."""
    lane = tl.arange(0, BM)
    row = lane // HEADS
    live = row < tl.load(END + tile) - first
    if BM % HEADS:
        live = live & (row < BM // HEADS)
    return row, lane % HEADS, live


@triton.jit
def _offsets(row, head, stride_row, stride_head, HEADS: tl.constexpr):
    """Of lanes, from the tile's first row and head; rows lie within 2³¹ of each other, heads anywhere."""
    offset = row * stride_row
    if HEADS > 1:
        offset = offset + head.to(tl.int64) * stride_head
    return offset


@triton.jit
def _where(P, offset, stride_d, BD: tl.constexpr):
    return P + (offset[:, None] + tl.arange(0, BD)[None, :] * stride_d)


@triton.jit
def _load(P, offset, live, stride_d, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """A tile of rows at these offsets; without the check all of them exist."""
    where = _where(P, offset, stride_d, BD)
    if CHECKED:
        x = tl.load(where, mask=live[:, None] & (tl.arange(0, BD) < D)[None, :], other=0.0)
    elif D < BD:
        x = tl.load(where, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        x = tl.load(where)
    return x


@triton.jit
def _store(P, x, offset, live, stride_d, D: tl.constexpr, BD: tl.constexpr):
    mask = live[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(_where(P, offset, stride_d, BD), x.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _sees(POSITION, LOWEST, row, live, keys, CUT: tl.constexpr):
    """Lanes by keys; lanes that are no queries see nothing."""
    sees = keys[None, :] <= tl.load(POSITION + row, mask=live, other=-1)[:, None]
    if CUT:
        sees = sees & (keys[None, :] >= tl.load(LOWEST + row, mask=live, other=0)[:, None])
    return sees


@triton.jit
def _list_of(BLOCK, tile, START, start_h, COUNT, TAIL, QUERY_END, kv):
    """Where the list of a tile's block begins, needs a mask from, and ends; and the block's end."""
    block = tl.load(BLOCK + tile)
    begin = tl.load(START + kv * start_h + block)
    end = begin + tl.load(COUNT + block)
    return begin, end - tl.load(TAIL + block), end, tl.load(QUERY_END + block)


@triton.jit
def _attend_entries(
    q, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, start, stop, limit, scale_log2, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    for place in range(start * PARTS, stop * PARTS):
        first = (tl.load(ENTRIES + place // PARTS) + place % PARTS * BN).to(tl.int32)
        k = _load(Kh + first.to(tl.int64) * skm, n * skm, n < limit - first, skd, D, BD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where(_sees(POSITION, LOWEST, row, live, first + n, CUT), s, float("-inf"))
        v = _load(Vh + first.to(tl.int64) * svm, n * svm, n < limit - first, svd, D, BD, MASKED)
        m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    return m, l, acc


@triton.jit
def _forward(
    Q, K, V, O, LSE, POSITION, LOWEST, BLOCK, FIRST, END, ENTRIES, START, start_h, COUNT, TAIL, QUERY_END,
    scale_log2, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    # The last blocks see most: they go first. Those that read the same keys go together.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, kv = place // (GROUP // HEADS), tl.program_id(1).to(tl.int64)
    h = kv * GROUP + place % (GROUP // HEADS) * HEADS
    first = tl.load(FIRST + tile).to(tl.int64)
    row, head, live = _lanes(END, tile, first, HEADS, BM)
    begin, edge, end, limit = _list_of(BLOCK, tile, START, start_h, COUNT, TAIL, QUERY_END, kv)
    q = _load(Q + h * sqh + first * sqn, _offsets(row, head, sqn, sqh, HEADS), live, sqd, D, BD, True)
    Kh, Vh, POSITION, LOWEST = K + kv * skh, V + kv * svh, POSITION + first, LOWEST + first
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    m, l, acc = _attend_entries(
        q, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, begin, edge, limit, scale_log2, m, l, acc,
        skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, False, CUT,
    )  # fmt: skip
    m, l, acc = _attend_entries(
        q, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, edge, end, limit, scale_log2, m, l, acc,
        skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, True, CUT,
    )  # fmt: skip
    # Lanes past the end may have seen nothing.
    l = tl.where(live, l, 1.0)
    _store(O + h * soh + first * son, acc / l[:, None], _offsets(row, head, son, soh, HEADS), live, 1, D, BD)
    lse = tl.where(live, m, 0.0) + tl.log2(l)
    tl.store(LSE + h * N + first + _offsets(row, head, 1, N, HEADS), lse, mask=live)


@triton.jit
def _query_gradient(
    q, do, lse, delta, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, start, stop, limit, scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    for place in range(start * PARTS, stop * PARTS):
        first = (tl.load(ENTRIES + place // PARTS) + place % PARTS * BN).to(tl.int32)
        k = _load(Kh + first.to(tl.int64) * skm, n * skm, n < limit - first, skd, D, BD, MASKED)
        v = _load(Vh + first.to(tl.int64) * svm, n * svm, n < limit - first, svd, D, BD, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        if MASKED:
            p = tl.where(_sees(POSITION, LOWEST, row, live, first + n, CUT), p, 0.0)
        dq = query_step(p, do, delta, k, v, dq, PRECISION)
    return dq


@triton.jit
def _backward_queries(
    Q, K, V, O, DO, LSE, DELTA, DQ, POSITION, LOWEST, BLOCK, FIRST, END,
    ENTRIES, START, start_h, COUNT, TAIL, QUERY_END,
    scale_log2, scale, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, kv = place // (GROUP // HEADS), tl.program_id(1).to(tl.int64)
    h = kv * GROUP + place % (GROUP // HEADS) * HEADS
    first = tl.load(FIRST + tile).to(tl.int64)
    row, head, live = _lanes(END, tile, first, HEADS, BM)
    begin, edge, end, limit = _list_of(BLOCK, tile, START, start_h, COUNT, TAIL, QUERY_END, kv)
    q = _load(Q + h * sqh + first * sqn, _offsets(row, head, sqn, sqh, HEADS), live, sqd, D, BD, True)
    given, place_given = h * soh + first * son, _offsets(row, head, son, soh, HEADS)
    do = _load(DO + given, place_given, live, 1, D, BD, True)
    out = _load(O + given, place_given, live, 1, D, BD, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    place_lse = _offsets(row, head, 1, N, HEADS)
    tl.store(DELTA + h * N + first + place_lse, delta, mask=live)
    lse = tl.load(LSE + h * N + first + place_lse, mask=live, other=0.0)
    Kh, Vh, POSITION, LOWEST = K + kv * skh, V + kv * svh, POSITION + first, LOWEST + first
    dq = tl.zeros([BM, BD], tl.float32)
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, begin, edge, limit, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, False, CUT,
    )  # fmt: skip
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, POSITION, LOWEST, row, live, ENTRIES, edge, end, limit, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, True, CUT,
    )  # fmt: skip
    _store(DQ + h * sgh + first * sgn, dq * scale, _offsets(row, head, sgn, sgh, HEADS), live, sgd, D, BD)


@triton.jit
def _key_gradient(
    k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, SEERS, start, stop, leap_at, leap, kv, N,
    scale_log2, dk, dv,
    sqh, sqn, sqd, soh, son,
    GROUP: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr, CHECKED: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr,
    BY_QUERIES: tl.constexpr,
):  # fmt: skip
    """Over tiles `start` to `stop`, of which those from `leap_at` on lie `leap` further on."""
    SPLIT: tl.constexpr = GROUP // HEADS
    for counted in range(start, stop):
        place = counted
        if MASKED:
            place += tl.where(counted < leap_at, 0, leap)
        tile = tl.load(SEERS + place // (CHUNKS * SPLIT))
        h = kv * GROUP + place % SPLIT * HEADS
        first = tl.load(FIRST + tile).to(tl.int64) + place // SPLIT % CHUNKS * (BM // HEADS)
        row, head, live = _lanes(END, tile, first, HEADS, BM)
        q = _load(Q + h * sqh + first * sqn, _offsets(row, head, sqn, sqh, HEADS), live, sqd, D, BD, CHECKED)
        do = _load(DO + h * soh + first * son, _offsets(row, head, son, soh, HEADS), live, 1, D, BD, CHECKED)
        place_lse = _offsets(row, head, 1, N, HEADS)
        if CHECKED:
            lse = tl.load(LSE + h * N + first + place_lse, mask=live, other=0.0)
            delta = tl.load(DELTA + h * N + first + place_lse, mask=live, other=0.0)
        else:
            lse = tl.load(LSE + h * N + first + place_lse)
            delta = tl.load(DELTA + h * N + first + place_lse)
        if BY_QUERIES:
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            if MASKED:
                p = tl.where(_sees(POSITION + first, LOWEST + first, row, live, keys, CUT), p, 0.0)
            dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
        else:
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
            if MASKED:
                p = tl.where(tl.trans(_sees(POSITION + first, LOWEST + first, row, live, keys, CUT)), p, 0.0)
            dk, dv = key_step(p, q, do, delta, v, dk, dv, PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    Q, K, V, DO, LSE, DELTA, DK, DV, POSITION, LOWEST, FIRST, END,
    SEERS, START, start_h, OWN, ORDER, order_h, KEY_FIRST, KEY_END,
    scale_log2, scale, N, heads,
    sqh, sqn: tl.constexpr, sqd, skh, skm, skd, svh, svm, svd, soh, son: tl.constexpr, sgh, sgn, sgd,
    GROUP: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
    CUT: tl.constexpr, BY_QUERIES: tl.constexpr,
):  # fmt: skip
    # Strides of rows are constants: a tile's addresses differ by constants then, and registers don't spill for them.
    TILES: tl.constexpr = CHUNKS * (GROUP // HEADS)
    # One dimension: a grid's others end at 65,535. The longest lists of all heads go first.
    kv = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.load(ORDER + kv * order_h + tl.program_id(0) // heads // PARTS)
    limit = tl.load(KEY_END + block)
    keys = tl.load(KEY_FIRST + block) + tl.program_id(0) // heads % PARTS * BN + tl.arange(0, BN)
    seen = tl.load(START + kv * start_h + block)
    unseen = tl.load(START + kv * start_h + block + 1)
    own = tl.minimum(seen + tl.load(OWN + block), unseen)
    # Tiles are full, but a document's last query block may be short: its tiles go with those that need a mask.
    ragged = unseen
    if CUT:
        own = unseen
    elif FULL:
        last = tl.load(SEERS + unseen - 1)
        short = tl.load(END + last) - tl.load(FIRST + last) < CHUNKS * (BM // HEADS)
        ragged = tl.maximum(tl.where(short, unseen - 1, unseen), own)
    k = load_tile(K + kv * skh, keys, limit, skm, skd, D, BD)
    v = load_tile(V + kv * svh, keys, limit, svm, svd, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    dk, dv = _key_gradient(
        k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, SEERS,
        seen * TILES, (own + unseen - ragged) * TILES, own * TILES, (ragged - own) * TILES, kv, N, scale_log2, dk, dv,
        sqh, sqn, sqd, soh, son, GROUP, HEADS, CHUNKS, D, BD, BM, PRECISION, True, True, CUT, BY_QUERIES,
    )  # fmt: skip
    dk, dv = _key_gradient(
        k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, SEERS,
        own * TILES, ragged * TILES, 0, 0, kv, N, scale_log2, dk, dv,
        sqh, sqn, sqd, soh, son, GROUP, HEADS, CHUNKS, D, BD, BM, PRECISION, not FULL, False, CUT,
        BY_QUERIES,
    )  # fmt: skip
    store_tile(DK + kv * sgh, dk * scale, keys, limit, sgn, sgd, D, BD)
    store_tile(DV + kv * sgh, dv, keys, limit, sgn, sgd, D, BD)
