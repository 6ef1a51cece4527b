"""Attention in which each block of queries sees the key blocks of its list, forward and backward, in Triton.

A program takes a tile of lanes (`lemo.kernels.block_lists`): the queries of one block, all rows or the kept ones, with
the query heads that share a key head folded in, so that a tile of keys is read once for all of them. It goes through
the block's list; only the last entries, those inside the query block itself, need a mask (where a sliding window cuts,
all do). Gradients of keys and values: a program takes a key block and goes through the tiles that see it, those that
most see first; sums have one order, so results repeat bit by bit.

N queries, M keys, H query heads, K key/value heads, G = H/K, d head size. FlashAttention-2's algorithm, as in
`lemo.kernels.attention`; logarithms of softmax denominators are to base 2.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.block_lists import BlockLists, RowTiles, cut_tiles, turn_round
from lemo.kernels.tiles import LOG2_E, load_tile, store_tile


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: lanes of a tile, warps of a program, tiles of keys in flight."""

    lanes: int
    warps: int
    stages: int


# Of the forward, the gradient of queries, and that of keys and values. A tile of keys is a key block.
FORWARD = Launch(lanes=128, warps=8, stages=3)
QUERIES = Launch(lanes=128, warps=8, stages=2)
KEYS = Launch(lanes=64, warps=4, stages=2)


@dataclass(frozen=True, eq=False)
class Queries:
    """Which queries attend.

    Attributes:
        lists: what they see.
        host_rows: their rows, int64 [N], ascending, on the CPU; None for all M rows.
    """

    lists: BlockLists
    host_rows: Tensor | None

    def tiles(self, group: int, lanes: int) -> RowTiles:
        """Their tiles of at most so many lanes; of half as many where a block has few queries left."""
        grid = self.lists.grid
        if self.host_rows is None:
            return grid.tiles_of_all(group, lanes)
        few = len(self.host_rows) * group <= len(grid.query_first) * lanes // 2
        return cut_tiles(grid, self.host_rows, group, max(16, lanes // 2) if few else lanes)


def block_sparse_forward(
    q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, queries: Queries, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its block's list up to itself.

    Args:
        q_HNd, k_KMd, v_KMd: one dtype, any strides; d at most 256.
        queries: their rows and lists; key blocks of 16 to 128 tokens, a power of two.
        scale: factor on q·k.

    Returns:
        Output [N, H, d], contiguous, in the inputs' dtype, 0 for queries of padding; logarithm (base 2) of each
        softmax's denominator, fp32 [H, N].
    """
    H, N, d = q_HNd.shape
    K = k_KMd.shape[0]
    new = torch.zeros if queries.lists.grid.padded else torch.empty
    out = new(N, H, d, device=q_HNd.device, dtype=q_HNd.dtype)
    lse = new(H, N, device=q_HNd.device, dtype=torch.float32)
    tiles = queries.tiles(H // K, FORWARD.lanes)
    if len(tiles.block):
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            _forward[(len(tiles.block), K)](
                q_HNd, k_KMd, v_KMd, out, lse, *_of_tiles(tiles), *_of_lists(queries.lists),
                scale * LOG2_E, N, k_KMd.shape[1],
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), out.stride(1), out.stride(0),
                **_constants(q_HNd, k_KMd, queries.lists, tiles, FORWARD),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [H, N, d], keys and values [K, M, d], in their dtypes; keys that nobody sees get zeros."""
    H, N, _ = q_HNd.shape
    K, M, _ = k_KMd.shape
    lists = queries.lists
    grad_NHd = grad_NHd.contiguous()
    new = torch.zeros if lists.grid.padded else torch.empty
    delta = new(H, N, device=q_HNd.device, dtype=torch.float32)
    dq, dk, dv = (new(x.shape, device=x.device, dtype=x.dtype) for x in (q_HNd, k_KMd, v_KMd))
    strides = (*q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0))
    with torch.cuda.device_of(q_HNd):
        tiles = queries.tiles(H // K, QUERIES.lanes)
        if len(tiles.block):
            _backward_queries[(len(tiles.block), K)](
                q_HNd, k_KMd, v_KMd, out_NHd, grad_NHd, lse_HN, delta, dq, *_of_tiles(tiles), *_of_lists(lists),
                scale * LOG2_E, scale, N, M, *strides, *dq.stride(),
                **_constants(q_HNd, k_KMd, lists, tiles, QUERIES),
            )  # fmt: skip
        tiles = queries.tiles(H // K, KEYS.lanes)
        seen_by = turn_round(lists, tiles)
        here = lists.grid.here
        _backward_keys[(K * len(here.key_first),)](
            q_HNd, k_KMd, v_KMd, grad_NHd, lse_HN, delta, dk, dv, *_of_tiles(tiles),
            seen_by.tiles, seen_by.start, _head_stride(seen_by.start), seen_by.head,
            seen_by.order, _head_stride(seen_by.order), here.key_first, here.key_end,
            scale * LOG2_E, scale, N, K, *strides, *dk.stride(),
            **_constants(q_HNd, k_KMd, lists, tiles, KEYS),
        )  # fmt: skip
    return dq, dk, dv


def _of_tiles(tiles: RowTiles) -> tuple[Tensor, ...]:
    lowest = tiles.position if tiles.lowest is None else tiles.lowest
    return tiles.position, lowest, tiles.block, tiles.first, tiles.end


def _of_lists(lists: BlockLists) -> tuple[Tensor | int, ...]:
    here = lists.grid.here
    return lists.entries, here.start, _head_stride(here.start), here.count, here.tail


def _head_stride(table: Tensor) -> int:
    """From one key head's line to the next; 0 where heads share one."""
    return table.stride(0) if table.shape[0] > 1 else 0


def _constants(q_HNd: Tensor, k_KMd: Tensor, lists: BlockLists, tiles: RowTiles, launch: Launch) -> dict[str, object]:
    d = q_HNd.shape[-1]
    wide = lists.grid.key_block > 64
    return {
        "GROUP": q_HNd.shape[0] // k_KMd.shape[0],
        "D": d,
        "BD": max(16, triton.next_power_of_2(d)),
        "BM": tiles.lanes,
        "BN": lists.grid.key_block,
        "CUT": tiles.lowest is not None,
        # Tensor cores round fp32 to 10 bits of mantissa; fp32 is for those who want it exact.
        "PRECISION": "ieee" if q_HNd.dtype == torch.float32 else "tf32",
        # A wider tile needs more registers and memory: twice the warps, two tiles in flight.
        "num_warps": 8 if wide else launch.warps,
        # Larger heads and fp32 have no room for more than one in a multiprocessor's memory.
        "num_stages": 1 if d * q_HNd.element_size() > 256 else 2 if wide else launch.stages,
    }


@triton.jit
def _lanes(POSITION, FIRST, END, tile, GROUP: tl.constexpr, BM: tl.constexpr):
    """A tile's lanes: whether they are queries, and their query, head in the group, and row in the batch."""
    lane = tl.load(FIRST + tile) + tl.arange(0, BM)
    live = lane < tl.load(END + tile)
    n = lane // GROUP
    # Lanes past the end see nothing.
    return live, n.to(tl.int64), (lane % GROUP).to(tl.int64), tl.load(POSITION + n, mask=live, other=-1)


@triton.jit
def _load_lanes(P, where, live, stride_d, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(P + where[:, None] + d[None, :] * stride_d, mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_lanes(P, x, where, live, stride_d, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = live[:, None] & (d < D)[None, :]
    tl.store(P + where[:, None] + d[None, :] * stride_d, x.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _sees(position, LOWEST, n, live, keys, CUT: tl.constexpr):
    """Lanes by keys."""
    sees = keys[None, :] <= position[:, None]
    if CUT:
        sees = sees & (keys[None, :] >= tl.load(LOWEST + n, mask=live, other=0)[:, None])
    return sees


@triton.jit
def _attend_entries(
    q, Kh, Vh, position, LOWEST, n, live, ENTRIES, start, stop, M, scale_log2, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    for entry in range(start, stop):
        keys = tl.load(ENTRIES + entry) + tl.arange(0, BN)
        k = load_tile(Kh, keys, M, skm, skd, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where(_sees(position, LOWEST, n, live, keys, CUT), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet has no maximum.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        v = load_tile(Vh, keys, M, svm, svd, D, BD)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m = m_new
    return m, l, acc


@triton.jit
def _forward(
    Q, K, V, O, LSE, POSITION, LOWEST, BLOCK, FIRST, END, ENTRIES, START, start_h, COUNT, TAIL,
    scale_log2, N, M,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    # The last blocks see most: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    live, n, g, position = _lanes(POSITION, FIRST, END, tile, GROUP, BM)
    h = kv * GROUP + g
    block = tl.load(BLOCK + tile)
    begin = tl.load(START + kv * start_h + block)
    end = begin + tl.load(COUNT + block)
    edge = end - tl.load(TAIL + block)
    q = _load_lanes(Q, h * sqh + n * sqn, live, sqd, D, BD)
    Kh, Vh = K + kv * skh, V + kv * svh
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    m, l, acc = _attend_entries(
        q, Kh, Vh, position, LOWEST, n, live, ENTRIES, begin, edge, M, scale_log2, m, l, acc, skm, skd, svm, svd,
        D, BD, BN, PRECISION, False, CUT,
    )  # fmt: skip
    m, l, acc = _attend_entries(
        q, Kh, Vh, position, LOWEST, n, live, ENTRIES, edge, end, M, scale_log2, m, l, acc, skm, skd, svm, svd,
        D, BD, BN, PRECISION, True, CUT,
    )  # fmt: skip
    # Lanes past the end may have seen nothing.
    l = tl.where(live, l, 1.0)
    _store_lanes(O, acc / l[:, None], h * soh + n * son, live, 1, D, BD)
    tl.store(LSE + h * N + n, tl.where(live, m, 0.0) + tl.log2(l), mask=live)


@triton.jit
def _query_gradient(
    q, do, lse, delta, Kh, Vh, position, LOWEST, n, live, ENTRIES, start, stop, M, scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    for entry in range(start, stop):
        keys = tl.load(ENTRIES + entry) + tl.arange(0, BN)
        k = load_tile(Kh, keys, M, skm, skd, D, BD)
        v = load_tile(Vh, keys, M, svm, svd, D, BD)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        if MASKED:
            p = tl.where(_sees(position, LOWEST, n, live, keys, CUT), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(
    Q, K, V, O, DO, LSE, DELTA, DQ, POSITION, LOWEST, BLOCK, FIRST, END, ENTRIES, START, start_h, COUNT, TAIL,
    scale_log2, scale, N, M,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    live, n, g, position = _lanes(POSITION, FIRST, END, tile, GROUP, BM)
    h = kv * GROUP + g
    block = tl.load(BLOCK + tile)
    begin = tl.load(START + kv * start_h + block)
    end = begin + tl.load(COUNT + block)
    edge = end - tl.load(TAIL + block)
    q = _load_lanes(Q, h * sqh + n * sqn, live, sqd, D, BD)
    do = _load_lanes(DO, h * soh + n * son, live, 1, D, BD)
    out = _load_lanes(O, h * soh + n * son, live, 1, D, BD)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h * N + n, delta, mask=live)
    lse = tl.load(LSE + h * N + n, mask=live, other=0.0)
    Kh, Vh = K + kv * skh, V + kv * svh
    dq = tl.zeros([BM, BD], tl.float32)
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, position, LOWEST, n, live, ENTRIES, begin, edge, M, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PRECISION, False, CUT,
    )  # fmt: skip
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, position, LOWEST, n, live, ENTRIES, edge, end, M, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PRECISION, True, CUT,
    )  # fmt: skip
    _store_lanes(DQ, dq * scale, h * sgh + n * sgn, live, sgd, D, BD)


@triton.jit
def _key_gradient(
    k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, TILES, start, stop, kv, N, scale_log2, dk, dv,
    sqh, sqn, sqd, soh, son,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    for place in range(start, stop):
        live, n, g, position = _lanes(POSITION, FIRST, END, tl.load(TILES + place), GROUP, BM)
        h = kv * GROUP + g
        q = _load_lanes(Q, h * sqh + n * sqn, live, sqd, D, BD)
        do = _load_lanes(DO, h * soh + n * son, live, 1, D, BD)
        lse = tl.load(LSE + h * N + n, mask=live, other=0.0)
        delta = tl.load(DELTA + h * N + n, mask=live, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
        if MASKED:
            p = tl.where(tl.trans(_sees(position, LOWEST, n, live, keys, CUT)), p, 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    Q, K, V, DO, LSE, DELTA, DK, DV, POSITION, LOWEST, BLOCK, FIRST, END,
    TILES, START, start_h, HEAD, ORDER, order_h, KEY_FIRST, KEY_END,
    scale_log2, scale, N, heads,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    # One dimension: a grid's others end at 65,535. The longest lists of all heads go first.
    kv = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.load(ORDER + kv * order_h + tl.program_id(0) // heads)
    limit = tl.load(KEY_END + block)
    keys = tl.load(KEY_FIRST + block) + tl.arange(0, BN)
    begin = tl.load(START + kv * start_h + block)
    end = tl.load(START + kv * start_h + block + 1)
    edge = tl.minimum(begin + tl.load(HEAD + block), end)
    k = load_tile(K + kv * skh, keys, limit, skm, skd, D, BD)
    v = load_tile(V + kv * svh, keys, limit, svm, svd, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    dk, dv = _key_gradient(
        k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, TILES, begin, edge, kv, N, scale_log2, dk, dv,
        sqh, sqn, sqd, soh, son, GROUP, D, BD, BM, PRECISION, True, CUT,
    )  # fmt: skip
    dk, dv = _key_gradient(
        k, v, keys, Q, DO, LSE, DELTA, POSITION, LOWEST, FIRST, END, TILES, edge, end, kv, N, scale_log2, dk, dv,
        sqh, sqn, sqd, soh, son, GROUP, D, BD, BM, PRECISION, False, CUT,
    )  # fmt: skip
    store_tile(DK + kv * sgh, dk * scale, keys, limit, sgn, sgd, D, BD)
    store_tile(DV + kv * sgh, dv, keys, limit, sgn, sgd, D, BD)
