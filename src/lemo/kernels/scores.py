"""Block-pair scores (paper equations 1-2) in Triton: the largest head-mean of positive scaled q·k between two blocks;
or the softmax mass that the one's queries give to the other's keys.

A program takes a square of 128 queries and 128 keys, adds relu(q·k) over the heads in registers, and stores one number
a pair of blocks: T·T numbers never exist. The keys' tile is read once for all query heads that share it. Half of the
squares lie above the diagonal or outside a sliding window; their programs end at once. The mass needs each row's
denominator, which takes as many products again, in a kernel that goes first.

Where scores are sampled, MOST_STRIDE squares of a row are computed or left out together: a program takes them all, the
next keys on their way while it multiplies.

T tokens of one document, H query heads, K key heads (H a multiple of K), d head size, b tokens a block.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.dispatch import MOST_STRIDE, NEAR_STRIPS, SCORED_BYTES, STRIP
from lemo.kernels.launches import card
from lemo.kernels.tiles import LOG2_E, load_tile, power_of_2, tiles_of

# Sampling leaves out whole squares.
SQUARE = STRIP
# For tiles, of the 227 KiB that a program may have on Hopper; what is left there is left elsewhere too.
SHARED_BYTES, SPARE_BYTES = 192 * 2**10, 16 * 2**10


def block_pair_scores(
    q_HTd: Tensor,
    k_KTd: Tensor,
    scale: float,
    block_size: int,
    window: int | None,
    mass: bool = False,
    *,
    sampled: bool = False,
) -> Tensor:
    """Scores of one document, fp32 [blocks, blocks]; query block, key block; 0 above the diagonal.

    Args:
        q_HTd, k_KTd: positioned queries and keys of one dtype, any strides; d at most 512 bytes.
        scale: factor on q·k, positive.
        block_size: a power of two from 16 to 128.
        window: sliding window in tokens, or None.
        mass: the softmax mass instead, mean over heads and the query block's rows.
        sampled: leaves out most of the distant squares and weighs the others, as
            `lemo.selection.scores.block_pair_scores` says; not with mass.
    """
    assert not (mass and sampled)
    H, T, d = q_HTd.shape
    K = k_KTd.shape[0]
    blocks = tiles_of(T, block_size)
    scores = torch.zeros(blocks, blocks, device=q_HTd.device, dtype=torch.float32)
    squares = tiles_of(T, SQUARE)
    # Two tiles of 512 bytes a row are 128 KiB of a multiprocessor's 228; of half that the next pair can be on its way.
    padded = max(16, power_of_2(d))
    width = padded * q_HTd.element_size()
    window = T if window is None else window
    shape = {
        "D": d, "BD": padded, "SIDE": SQUARE,
        "PRECISION": "ieee" if q_HTd.dtype == torch.float32 else "tf32",
        "num_warps": 8, "num_stages": 2 if 2 * width <= SCORED_BYTES else 1,
    }  # fmt: skip
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(q_HTd):
        lse = None
        if mass:
            lse = torch.empty(H, T, device=q_HTd.device, dtype=torch.float32)
            _row_lse[(squares, H)](
                q_HTd, k_KTd, lse, scale * LOG2_E, T, window, *q_HTd.stride(), *k_KTd.stride(), GROUP=H // K, **shape
            )
        if sampled:
            # All heads' queries stay in shared memory while keys go by; or, of many, each head's come with its keys.
            room = min(SHARED_BYTES, card(q_HTd.device)[1] - SPARE_BYTES)
            # With two stages no keys would be on their way during a product. With half a square's keys at a time there
            # is room for three; for two programs, too, where one head has 128 numbers.
            wide = max(SQUARE // 2, block_size)
            held = H * width <= SCORED_BYTES and H * width * (SQUARE + wide) <= room
            stage = H * width * wide if held else width * (SQUARE + wide)
            stages = max(1, min(3, (room - (H * width * SQUARE if held else 0)) // stage))
            # The first strip of keys is a group of its own.
            _sampled_scores[(1 + tiles_of(squares - 1, MOST_STRIDE), squares)](
                q_HTd, k_KTd, scores, scale / H, T, blocks, window, *q_HTd.stride(), *k_KTd.stride(),
                H=H, GROUP=H // K, HELD=held, WIDE=wide, BLOCK=block_size,
                NEAR=NEAR_STRIPS, DOUBLINGS=MOST_STRIDE.bit_length() - 1, **shape | {"num_stages": stages},
            )  # fmt: skip
            return scores
        _block_pair_scores[(squares, squares)](
            q_HTd, k_KTd, scores, lse,
            scale * LOG2_E if mass else scale / H, T, blocks, window,
            *q_HTd.stride(), *k_KTd.stride(),
            K=K, GROUP=H // K, BLOCK=block_size, MASS=mass, **shape,
        )  # fmt: skip
    return scores


@triton.jit
def _row_lse(
    Q, KEYS, LSE,
    scale, T, window,
    sqh, sqn, sqd, skh, skm, skd,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logarithm to base 2 of each row's softmax denominator, of scores times log2(e)."""
    row, head = tl.program_id(0), tl.program_id(1)
    rows = row * SIDE + tl.arange(0, SIDE)
    q = load_tile(Q + tl.cast(head, tl.int64) * sqh, rows, T, sqn, sqd, D, BD)
    largest = tl.full([SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE], tl.float32)
    first = tl.maximum(row * SIDE - window + 1, 0) // SIDE
    for column in range(first, row + 1):
        keys = column * SIDE + tl.arange(0, SIDE)
        k = tl.trans(load_tile(KEYS + tl.cast(head // GROUP, tl.int64) * skh, keys, T, skm, skd, D, BD))
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1))
        # A row that has seen no key yet.
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        largest = now
    tl.store(LSE + tl.cast(head, tl.int64) * T + rows, largest + tl.log2(total), mask=rows < T)


@triton.jit
def _block_pair_scores(
    Q, KEYS, SCORES, LSE,
    scale, T, blocks, window,
    sqh, sqn, sqd, skh, skm, skd,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    MASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1), tl.program_id(0)
    # The square's first query sees keys after first - window; its last query none after itself.
    if (column <= row) & ((column + 1) * SIDE > row * SIDE - window + 1):
        rows = row * SIDE + tl.arange(0, SIDE)
        keys = column * SIDE + tl.arange(0, SIDE)
        sums = tl.zeros([SIDE, SIDE], tl.float32)
        for kv in range(K):
            k = tl.trans(load_tile(KEYS + tl.cast(kv, tl.int64) * skh, keys, T, skm, skd, D, BD))
            for g in range(GROUP):
                q = load_tile(Q + tl.cast(kv * GROUP + g, tl.int64) * sqh, rows, T, sqn, sqd, D, BD)
                s = tl.dot(q, k, input_precision=PRECISION)
                if MASS:
                    lse = tl.load(LSE + tl.cast(kv * GROUP + g, tl.int64) * T + rows, mask=rows < T, other=0.0)
                    # Of keys that aren't seen it may be any size.
                    sums += tl.exp2(tl.minimum(s * scale - lse[:, None], 0.0))
                else:
                    sums += tl.maximum(s, 0.0)
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
        PAIRS: tl.constexpr = SIDE // BLOCK
        i, j = row * PAIRS + tl.arange(0, PAIRS), column * PAIRS + tl.arange(0, PAIRS)
        if MASS:
            seen &= rows[:, None] < T
            sums = tl.reshape(tl.where(seen, sums, 0.0), (PAIRS, BLOCK, PAIRS, BLOCK))
            queries = tl.minimum(T - i * BLOCK, BLOCK).to(tl.float32)
            found = tl.sum(tl.sum(sums, 3), 1) / (queries * (K * GROUP))[:, None]
        else:
            sums = tl.reshape(tl.where(seen, sums * scale, 0.0), (PAIRS, BLOCK, PAIRS, BLOCK))
            found = tl.max(tl.max(sums, 3), 1)
        where = SCORES + i.to(tl.int64)[:, None] * blocks + j[None, :]
        tl.store(where, found, mask=(i < blocks)[:, None] & (j < blocks)[None, :])


@triton.jit
def _stride(distance, NEAR: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Of how many rows of squares one is computed, so many squares from the diagonal."""
    stride = 1
    for doubling in tl.static_range(DOUBLINGS):
        stride = tl.where(distance >= NEAR << doubling, 2 << doubling, stride)
    return stride


@triton.jit
def _sampled_scores(
    Q, KEYS, SCORES,
    scale, T, blocks, window,
    sqh, sqn, sqd, skh, skm, skd,
    H: tl.constexpr, GROUP: tl.constexpr, HELD: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, NEAR: tl.constexpr, DOUBLINGS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A row's squares of one stride: their columns end at a multiple of the largest stride, and are as many."""
    MOST: tl.constexpr = 1 << DOUBLINGS
    row, end = tl.program_id(1), tl.program_id(0) * MOST
    stride = _stride(row - end, NEAR, DOUBLINGS)
    # The row's first query sees keys after first - window; its last query none after itself.
    first = tl.maximum(tl.maximum(end - MOST + 1, 0), tl.maximum(row * SIDE - window + 1, 0) // SIDE)
    last = tl.minimum(end, row)
    if (first <= last) & (row % stride == 0):
        DOWN: tl.constexpr = SIDE // BLOCK
        ACROSS: tl.constexpr = WIDE // BLOCK
        # A step takes WIDE keys, and all heads or one.
        HEADS: tl.constexpr = H if HELD else 1
        STEPS: tl.constexpr = H // HEADS
        rows = row * SIDE + tl.arange(0, SIDE)
        i = row * DOWN + tl.arange(0, DOWN)
        # The squares stand for those below them up to the next ones, or to the last.
        weight = scale * tl.minimum(stride, tl.num_programs(1) - row).to(tl.float32)
        queries = ()
        if HELD:
            for h in tl.static_range(H):
                q = load_tile(Q + tl.cast(h, tl.int64) * sqh, rows, T, sqn, sqd, D, BD)
                queries += (q,)  # type: ignore[assignment]
        else:
            sums = tl.zeros([SIDE, WIDE], tl.float32)
        for step in range(first * (SIDE // WIDE * STEPS), (last + 1) * (SIDE // WIDE * STEPS)):
            part = step // STEPS
            keys = part * WIDE + tl.arange(0, WIDE)
            for own in tl.static_range(HEADS):
                head = step % STEPS + own
                k = load_tile(KEYS + tl.cast(head // GROUP, tl.int64) * skh, keys, T, skm, skd, D, BD)
                q = queries[own] if HELD else load_tile(Q + tl.cast(head, tl.int64) * sqh, rows, T, sqn, sqd, D, BD)
                s = tl.maximum(tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
                if HELD and own == 0:
                    sums = s
                else:
                    sums += s
            if step % STEPS == STEPS - 1:
                # Some query is before some key, or a window after it.
                if ((part + 1) * WIDE > row * SIDE) | ((row + 1) * SIDE - part * WIDE > window):
                    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
                    sums = tl.where(seen, sums, 0.0)
                found = tl.max(tl.max(tl.reshape(sums, (DOWN, BLOCK, ACROSS, BLOCK)), 3), 1)
                j = part * ACROSS + tl.arange(0, ACROSS)
                where = SCORES + i.to(tl.int64)[:, None] * blocks + j[None, :]
                tl.store(where, found * weight, mask=(i < blocks)[:, None] & (j < blocks)[None, :])
                if not HELD:
                    sums = tl.zeros([SIDE, WIDE], tl.float32)
