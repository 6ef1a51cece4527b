"""Block-pair scores (paper equations 1-2) in Triton: the largest head-mean of positive scaled q·k between two blocks.

A program takes a square of 128 queries and 128 keys, adds relu(q·k) over the heads in registers, and stores one number
a pair of blocks: T·T numbers never exist. The keys' tile is read once for all query heads that share it. Half of the
squares lie above the diagonal or outside a sliding window; their programs end at once.

T tokens of one document, H query heads, K key heads (H a multiple of K), d head size, b tokens a block.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.dispatch import SCORED_BYTES
from lemo.kernels.tiles import load_tile

SQUARE = 128


def block_pair_scores(q_HTd: Tensor, k_KTd: Tensor, scale: float, block_size: int, window: int | None) -> Tensor:
    """Scores of one document, fp32 [blocks, blocks]; query block, key block; 0 above the diagonal.

    Args:
        q_HTd, k_KTd: positioned queries and keys of one dtype, any strides; d at most 512 bytes.
        scale: factor on q·k, positive.
        block_size: a power of two from 16 to 128.
        window: sliding window in tokens, or None.
    """
    H, T, d = q_HTd.shape
    K = k_KTd.shape[0]
    blocks = triton.cdiv(T, block_size)
    scores = torch.zeros(blocks, blocks, device=q_HTd.device, dtype=torch.float32)
    squares = triton.cdiv(T, SQUARE)
    # Two tiles of 512 bytes a row are 128 KiB of a multiprocessor's 228; of half that the next pair can be on its way.
    width = triton.next_power_of_2(d) * q_HTd.element_size()
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(q_HTd):
        _block_pair_scores[(squares, squares)](
            q_HTd, k_KTd, scores,
            scale / H, T, blocks, T if window is None else window,
            *q_HTd.stride(), *k_KTd.stride(),
            K=K, GROUP=H // K, D=d, BD=max(16, triton.next_power_of_2(d)), SIDE=SQUARE, BLOCK=block_size,
            PRECISION="ieee" if q_HTd.dtype == torch.float32 else "tf32",
            num_warps=8, num_stages=2 if 2 * width <= SCORED_BYTES else 1,
        )  # fmt: skip
    return scores


@triton.jit
def _block_pair_scores(
    Q, KEYS, SCORES,
    scale, T, blocks, window,
    sqh, sqn, sqd, skh, skm, skd,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
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
                sums += tl.maximum(tl.dot(q, k, input_precision=PRECISION), 0.0)
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
        sums = tl.where(seen, sums * scale, 0.0)
        PAIRS: tl.constexpr = SIDE // BLOCK
        largest = tl.max(tl.max(tl.reshape(sums, (PAIRS, BLOCK, PAIRS, BLOCK)), 3), 1)
        i, j = row * PAIRS + tl.arange(0, PAIRS), column * PAIRS + tl.arange(0, PAIRS)
        where = SCORES + i.to(tl.int64)[:, None] * blocks + j[None, :]
        tl.store(where, largest, mask=(i < blocks)[:, None] & (j < blocks)[None, :])
