"""Block-pair scores (paper equations 1-2) in Triton: the largest head-mean of positive scaled q·k between two blocks;
or the softmax mass that the one's queries give to the other's keys.

A program takes a square of 128 queries and 128 keys, adds relu(q·k) over the heads in registers, and stores one number
a pair of blocks: T·T numbers never exist. The keys' tile is read once for all query heads that share it. Half of the
squares lie above the diagonal or outside a sliding window; their programs end at once, and so do those of distant
squares where scores are sampled. The mass needs each row's denominator, which takes as many products again, in a kernel
that goes first.

T tokens of one document, H query heads, K key heads (H a multiple of K), d head size, b tokens a block.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.dispatch import MOST_STRIDE, NEAR_STRIPS, SCORED_BYTES, STRIP
from lemo.kernels.tiles import LOG2_E, load_tile, power_of_2, tiles_of

# Sampling leaves out whole squares.
SQUARE = STRIP


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
    width = power_of_2(d) * q_HTd.element_size()
    window = T if window is None else window
    shape = {
        "D": d, "BD": max(16, power_of_2(d)), "SIDE": SQUARE,
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
        _block_pair_scores[(squares, squares)](
            q_HTd, k_KTd, scores, lse,
            scale * LOG2_E if mass else scale / H, T, blocks, window,
            *q_HTd.stride(), *k_KTd.stride(),
            K=K, GROUP=H // K, BLOCK=block_size, MASS=mass,
            SAMPLED=sampled, NEAR=NEAR_STRIPS, DOUBLINGS=MOST_STRIDE.bit_length() - 1, **shape,
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
def _stride(distance, NEAR: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Of how many rows of squares one is computed, so many squares from the diagonal."""
    stride = 1
    for doubling in tl.static_range(DOUBLINGS):
        stride = tl.where(distance >= NEAR << doubling, 2 << doubling, stride)
    return stride


@triton.jit
def _block_pair_scores(
    Q, KEYS, SCORES, LSE,
    scale, T, blocks, window,
    sqh, sqn, sqd, skh, skm, skd,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    MASS: tl.constexpr, SAMPLED: tl.constexpr, NEAR: tl.constexpr, DOUBLINGS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1), tl.program_id(0)
    # The square's first query sees keys after first - window; its last query none after itself.
    wanted = (column <= row) & ((column + 1) * SIDE > row * SIDE - window + 1)
    if SAMPLED:
        MOST: tl.constexpr = 1 << DOUBLINGS
        stride = _stride(row - tl.cdiv(column, MOST) * MOST, NEAR, DOUBLINGS)
        wanted &= row % stride == 0
    if wanted:
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
        if SAMPLED:
            # The square stands for those below it up to the next one, or to the last.
            found *= tl.minimum(stride, tl.num_programs(1) - row).to(tl.float32)
        where = SCORES + i.to(tl.int64)[:, None] * blocks + j[None, :]
        tl.store(where, found, mask=(i < blocks)[:, None] & (j < blocks)[None, :])
