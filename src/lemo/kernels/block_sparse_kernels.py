"""The Triton kernels of block-sparse attention, which `lemo.kernels.block_sparse` explains and starts.

Tiles of queries go by lanes (`lemo.kernels.lanes`): of all rows, one head's lie side by side; where few of a block are
kept, the heads that share a key head fill the tile. Where lanes lie from a tile's first is the same for
all tiles, so that a loop adds one number: addresses by lane were two thirds of its instructions. Tiles that follow each
other, keys of a run and queries of a range, are found by arithmetic: loads of later ones wait for no list.

H query heads, K key/value heads, GROUP = H/K; D head size, BD that of tiles; a tile has BN keys, PARTS of them a key
block; CUT: a sliding window cuts, and every tile needs a mask; TMA: KD, VD, QD and DOD are descriptors, by which the
hardware copies tiles that need no mask.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from lemo.kernels.lanes import fetch_tile, lanes_of, load_keys, load_lanes, offsets_of, sees, store_lanes
from lemo.kernels.tiles import key_step, load_tile, query_step, softmax_step, store_tile


@triton.jit
def _list_of(BLOCK, tile, START, start_h, CHOSEN, RUN, QUERY_FIRST, QUERY_END, kv):
    """Of a tile's block: where its chosen entries begin and end, the first rows of its run and of itself, its end."""
    block = tl.load(BLOCK + tile)
    begin = tl.load(START + kv * start_h + block)
    end = begin + tl.load(CHOSEN + block)
    return begin, end, tl.load(RUN + block), tl.load(QUERY_FIRST + block), tl.load(QUERY_END + block)


@triton.jit
def _attend_keys(
    q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, first, limit, scale_log2, boost, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    k = load_keys(Kh, KD, kv, first, limit, skm, skd, D, BD, BN, MASKED, TMA)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if WEIGHTED:
        s += boost
    if MASKED:
        s = tl.where(sees(POSITION, LOWEST, row, live, first + n, CUT), s, float("-inf"))
    v = load_keys(Vh, VD, kv, first, limit, svm, svd, D, BD, BN, MASKED, TMA)
    return softmax_step(s, v, m, l, acc, PRECISION)


@triton.jit
def _attend_chosen(
    q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, ENTRIES, BOOST, start, stop, limit, scale_log2, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    for place in range(start * PARTS, stop * PARTS):
        first = (tl.load(ENTRIES + place // PARTS) + place % PARTS * BN).to(tl.int32)
        boost = 0.0
        if WEIGHTED:
            boost = tl.load(BOOST + place // PARTS)
        m, l, acc = _attend_keys(
            q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, first, limit, scale_log2, boost, m, l, acc,
            skm, skd, svm, svd, D, BD, BN, PRECISION, CUT, CUT, WEIGHTED, TMA,
        )  # fmt: skip
    return m, l, acc


@triton.jit
def _attend_run(
    q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run, stop, limit, scale_log2, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys that follow each other: where they lie is arithmetic, so that loads of later ones wait for none."""
    for step in range(0, stop - run, BN):
        m, l, acc = _attend_keys(
            q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run + step, limit, scale_log2, 0.0, m, l, acc,
            skm, skd, svm, svd, D, BD, BN, PRECISION, MASKED, CUT, False, TMA,
        )  # fmt: skip
    return m, l, acc


@triton.jit
def forward(
    Q, K, V, KD, VD, O, LSE, POSITION, LOWEST, BLOCK, FIRST, END,
    ENTRIES, BOOST, START, start_h, CHOSEN, RUN, QUERY_FIRST, QUERY_END,
    scale_log2, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # The last blocks see most: they go first. Those that read the same keys go together.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, kv = place // (GROUP // HEADS), tl.program_id(1).to(tl.int64)
    h = kv * GROUP + place % (GROUP // HEADS) * HEADS
    first = tl.load(FIRST + tile).to(tl.int64)
    row, head, live = lanes_of(tl.load(END + tile) - first, HEADS, BM)
    begin, end, run, own, limit = _list_of(BLOCK, tile, START, start_h, CHOSEN, RUN, QUERY_FIRST, QUERY_END, kv)
    q = load_lanes(Q + h * sqh + first * sqn, offsets_of(row, head, sqn, sqh, HEADS), live, sqd, D, BD, True)
    Kh, Vh, POSITION, LOWEST = K + kv * skh, V + kv * svh, POSITION + first, LOWEST + first
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    m, l, acc = _attend_chosen(
        q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, ENTRIES, BOOST, begin, end, limit, scale_log2, m, l, acc,
        skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, CUT, WEIGHTED, TMA,
    )  # fmt: skip
    m, l, acc = _attend_run(
        q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run, own, limit, scale_log2, m, l, acc,
        skm, skd, svm, svd, D, BD, BN, PRECISION, CUT, CUT, TMA,
    )  # fmt: skip
    m, l, acc = _attend_run(
        q, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, own, _past_last(POSITION, END, tile, first), limit,
        scale_log2, m, l, acc, skm, skd, svm, svd, D, BD, BN, PRECISION, True, CUT, TMA,
    )  # fmt: skip
    # Lanes past the end may have seen nothing.
    l = tl.where(live, l, 1.0)
    store_lanes(O + h * soh + first * son, acc / l[:, None], offsets_of(row, head, son, soh, HEADS), live, 1, D, BD)
    lse = tl.where(live, m, 0.0) + tl.log2(l)
    tl.store(LSE + h * N + first + offsets_of(row, head, 1, N, HEADS), lse, mask=live)


@triton.jit
def _past_last(POSITION, END, tile, first):
    """One past the row of a tile's last query, which sees no key from there on."""
    return tl.load(POSITION + tl.load(END + tile) - 1 - first) + 1


@triton.jit
def _query_keys(
    q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, first, limit, scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    k = load_keys(Kh, KD, kv, first, limit, skm, skd, D, BD, BN, MASKED, TMA)
    v = load_keys(Vh, VD, kv, first, limit, svm, svd, D, BD, BN, MASKED, TMA)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
    if MASKED:
        p = tl.where(sees(POSITION, LOWEST, row, live, first + n, CUT), p, 0.0)
    return query_step(p, do, delta, k, v, dq, PRECISION)


@triton.jit
def _query_chosen(
    q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, ENTRIES, BOOST, start, stop, limit,
    scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    for place in range(start * PARTS, stop * PARTS):
        first = (tl.load(ENTRIES + place // PARTS) + place % PARTS * BN).to(tl.int32)
        lse_here = lse
        if WEIGHTED:
            lse_here = lse - tl.load(BOOST + place // PARTS)
        dq = _query_keys(
            q, do, lse_here, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, first, limit, scale_log2, dq,
            skm, skd, svm, svd, D, BD, BN, PRECISION, CUT, CUT, TMA,
        )  # fmt: skip
    return dq


@triton.jit
def _query_run(
    q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run, stop, limit, scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    for step in range(0, stop - run, BN):
        dq = _query_keys(
            q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run + step, limit, scale_log2, dq,
            skm, skd, svm, svd, D, BD, BN, PRECISION, MASKED, CUT, TMA,
        )  # fmt: skip
    return dq


@triton.jit
def backward_queries(
    Q, K, V, KD, VD, O, DO, LSE, PAIRS, DQ, POSITION, LOWEST, BLOCK, FIRST, END,
    ENTRIES, BOOST, START, start_h, CHOSEN, RUN, QUERY_FIRST, QUERY_END,
    scale_log2, scale, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, kv = place // (GROUP // HEADS), tl.program_id(1).to(tl.int64)
    h = kv * GROUP + place % (GROUP // HEADS) * HEADS
    first = tl.load(FIRST + tile).to(tl.int64)
    row, head, live = lanes_of(tl.load(END + tile) - first, HEADS, BM)
    begin, end, run, own, limit = _list_of(BLOCK, tile, START, start_h, CHOSEN, RUN, QUERY_FIRST, QUERY_END, kv)
    q = load_lanes(Q + h * sqh + first * sqn, offsets_of(row, head, sqn, sqh, HEADS), live, sqd, D, BD, True)
    given, place_given = h * soh + first * son, offsets_of(row, head, son, soh, HEADS)
    do = load_lanes(DO + given, place_given, live, 1, D, BD, True)
    out = load_lanes(O + given, place_given, live, 1, D, BD, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    place_lse = offsets_of(row, head, 1, N, HEADS)
    lse = tl.load(LSE + h * N + first + place_lse, mask=live, other=0.0)
    PAIRS += 2 * (h * N + first)
    tl.store(PAIRS + 2 * place_lse, lse, mask=live)
    tl.store(PAIRS + 2 * place_lse + 1, delta, mask=live)
    Kh, Vh, POSITION, LOWEST = K + kv * skh, V + kv * svh, POSITION + first, LOWEST + first
    dq = tl.zeros([BM, BD], tl.float32)
    dq = _query_chosen(
        q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, ENTRIES, BOOST, begin, end, limit,
        scale_log2, dq, skm, skd, svm, svd, D, BD, BN, PARTS, PRECISION, CUT, WEIGHTED, TMA,
    )  # fmt: skip
    dq = _query_run(
        q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, run, own, limit, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PRECISION, CUT, CUT, TMA,
    )  # fmt: skip
    dq = _query_run(
        q, do, lse, delta, Kh, Vh, KD, VD, kv, POSITION, LOWEST, row, live, own, _past_last(POSITION, END, tile, first),
        limit, scale_log2, dq,
        skm, skd, svm, svd, D, BD, BN, PRECISION, True, CUT, TMA,
    )  # fmt: skip
    store_lanes(DQ + h * sgh + first * sgn, dq * scale, offsets_of(row, head, sgn, sgh, HEADS), live, sgd, D, BD)


@triton.jit
def _key_gradient(
    k, v, keys, Q, DO, QD, DOD, PAIRS, POSITION, LOWEST, first, end, h, boost, N, scale_log2, dk, dv,
    sqh, sqn, sqd, soh, son,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    CHECKED: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of queries from `first` on, those before `end`, which is looked at where `CHECKED`."""
    h, first = h.to(tl.int64), first.to(tl.int64)
    row, head, live = lanes_of(end - first, HEADS, BM)
    if TMA and HEADS == 1 and not CHECKED:
        q, do = fetch_tile(QD, h, first, BM, BD), fetch_tile(DOD, h, first, BM, BD)
    else:
        q = load_lanes(Q + h * sqh + first * sqn, offsets_of(row, head, sqn, sqh, HEADS), live, sqd, D, BD, CHECKED)
        do = load_lanes(DO + h * soh + first * son, offsets_of(row, head, son, soh, HEADS), live, 1, D, BD, CHECKED)
    # Two numbers a lane lie side by side: half the copies, which are a lane's each.
    place_pair = offsets_of(row, head, 1, N, HEADS)
    if CHECKED:
        pair = tl.load(PAIRS + h * N + first + place_pair, mask=live, other=0)
    else:
        pair = tl.load(PAIRS + h * N + first + place_pair)
    lse = pair.to(tl.int32).to(tl.float32, bitcast=True)
    delta = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    if WEIGHTED:
        lse -= boost
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where(tl.trans(sees(POSITION + first, LOWEST + first, row, live, keys, CUT)), p, 0.0)
    return key_step(p, q, do, delta, v, dk, dv, PRECISION)


@triton.jit
def backward_keys(
    Q, K, V, DO, QD, DOD, PAIRS, DK, DV, POSITION, LOWEST, RANGE_FIRST, RANGE_FULL, RANGE_END,
    FIRST, END, SEERS, BOOST, START, start_h, ORDER, KEY_FIRST, KEY_END,
    scale_log2, scale, N, blocks, sharing,
    sqh, sqn: tl.constexpr, sqd, skh, skm, skd, svh, svm, svd, soh, son: tl.constexpr, sgh, sgn, sgd,
    GROUP: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
    CUT: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Strides of rows are constants: a tile's addresses differ by constants then, and registers don't spill for them.
    SPLIT: tl.constexpr = GROUP // HEADS
    ROWS: tl.constexpr = BM // HEADS
    # One dimension: a grid's others end at 65,535. Heads that share an order take turns.
    turn = tl.program_id(0) // sharing
    place = tl.load(ORDER + turn // PARTS)
    kv, block = (place // blocks + tl.program_id(0) % sharing).to(tl.int64), place % blocks
    h = kv.to(tl.int32) * GROUP
    limit = tl.load(KEY_END + block)
    keys = tl.load(KEY_FIRST + block) + turn % PARTS * BN + tl.arange(0, BN)
    # Of the range the first tiles hold the keys' own rows and the last may be short; all between are full.
    first, end = tl.load(RANGE_FIRST + block), tl.load(RANGE_END + block)
    own = tl.cdiv((end if CUT else tl.load(RANGE_FULL + block)) - first, ROWS)
    full = tl.maximum((end - first) // ROWS - own, 0)
    masked = tl.cdiv(end - first, ROWS) - full
    begin = tl.load(START + kv * start_h + block)
    listed = (tl.load(START + kv * start_h + block + 1) - begin).to(tl.int32)
    SEERS, BOOST = SEERS + begin, BOOST + begin
    short = 0
    if FULL:
        # Of those listed a document's last query block may be short: its tiles go with the ones that need a mask.
        last = tl.load(SEERS + listed - 1, mask=listed > 0, other=0)
        last_first, last_end, last_boost = tl.load(FIRST + last), tl.load(END + last), 0.0
        if WEIGHTED:
            last_boost = tl.load(BOOST + listed - 1, mask=listed > 0, other=0.0)
        is_short = (listed > 0) & (last_end - last_first < CHUNKS * ROWS)
        short = tl.where(is_short, tl.cdiv(last_end - last_first, ROWS), 0)
        listed -= tl.where(is_short, 1, 0)
    k = load_tile(K + kv * skh, keys, limit, skm, skd, D, BD)
    v = load_tile(V + kv * svh, keys, limit, svm, svd, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for place in range((masked + short) * SPLIT):
        tile = place // SPLIT
        at, stop, boost = first + (tile + tl.where(tile < own, 0, full)) * ROWS, end, 0.0
        if FULL:
            ranged = tile < masked
            at = tl.where(ranged, at, last_first + (tile - masked) * ROWS)
            stop, boost = tl.where(ranged, end, last_end), tl.where(ranged, 0.0, last_boost)
        dk, dv = _key_gradient(
            k, v, keys, Q, DO, QD, DOD, PAIRS, POSITION, LOWEST, at, stop, h + place % SPLIT * HEADS, boost, N,
            scale_log2,
            dk, dv, sqh, sqn, sqd, soh, son, HEADS, D, BD, BM, PRECISION, True, True, CUT, WEIGHTED and FULL, TMA,
        )  # fmt: skip
    if not CUT:
        for place in range(full * SPLIT):
            at = first + (own + place // SPLIT) * ROWS
            dk, dv = _key_gradient(
                k, v, keys, Q, DO, QD, DOD, PAIRS, POSITION, LOWEST, at, end, h + place % SPLIT * HEADS, 0.0, N,
                scale_log2,
                dk, dv, sqh, sqn, sqd, soh, son, HEADS, D, BD, BM, PRECISION, BM % HEADS > 0, False, False, False, TMA,
            )  # fmt: skip
    for place in range(listed * (CHUNKS * SPLIT)):
        seer = tl.load(SEERS + place // (CHUNKS * SPLIT))
        if FULL:
            # Query blocks of a document lie side by side, so nothing but the list need be read.
            at, stop = last_first + (seer - last) * (CHUNKS * ROWS), 0
        else:
            at, stop = tl.load(FIRST + seer), tl.load(END + seer)
        at += place // SPLIT % CHUNKS * ROWS
        boost = 0.0
        if WEIGHTED:
            boost = tl.load(BOOST + place // (CHUNKS * SPLIT))
        dk, dv = _key_gradient(
            k, v, keys, Q, DO, QD, DOD, PAIRS, POSITION, LOWEST, at, stop, h + place % SPLIT * HEADS, boost, N,
            scale_log2,
            dk, dv, sqh, sqn, sqd, soh, son, HEADS, D, BD, BM, PRECISION, not FULL, CUT, CUT, WEIGHTED, TMA,
        )  # fmt: skip
    store_tile(DK + kv * sgh, dk * scale, keys, limit, sgn, sgd, D, BD)
    store_tile(DV + kv * sgh, dv, keys, limit, sgn, sgd, D, BD)
