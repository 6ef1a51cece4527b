"""From block scores to kept rows, by a Triton kernel.

A program takes a document. The least score that is kept is found bit by bit, by counting, so nothing is sorted; a kept
block's place among the kept comes from a running sum. In torch that is nine operations of a few numbers, each of which
costs the host as much as this launch.

n blocks of a document. `documents`: int64 [documents, 4], each one's first block, blocks, first row and the row after
its last.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import power_of_2

# Numbers of a tile.
_TILE = 4096
_LEAST: tl.constexpr = tl.constexpr(-(2**31))
_MOST: tl.constexpr = tl.constexpr(2**31 - 1)


def top_rows(score: Tensor, documents: Tensor, kept: Tensor, rows: int, size: int, longest: int) -> Tensor:
    """Ascending rows of each document's first and last block and its others of highest score, int64 [rows].

    Args:
        score: fp32 [blocks], contiguous; ties go to the earlier, what isn't a number comes last.
        documents: as above.
        kept: int64 [documents, 2], how many blocks each keeps, all or at least 2, and its first place in the result.
        rows: tokens of all that is kept.
        size: tokens per block; a document's last may be short.
        longest: n of the longest document.
    """
    out = torch.empty(rows, device=score.device, dtype=torch.int64)
    BN = power_of_2(longest)
    launch(
        _top_rows, (len(documents),), score, documents, kept, out, size,
        BN=BN, BS=min(power_of_2(size), max(1, _TILE // BN)), num_warps=min(16, max(4, BN // 256)),
    )  # fmt: skip
    return out


@triton.jit
def _top_rows(SCORE, DOCUMENTS, KEPT, ROWS, size, BN: tl.constexpr, BS: tl.constexpr):
    document = tl.program_id(0)
    first = tl.load(DOCUMENTS + 4 * document)
    n = tl.load(DOCUMENTS + 4 * document + 1).to(tl.int32)
    kept = tl.load(KEPT + 2 * document).to(tl.int32)
    i = tl.arange(0, BN)
    there = i < n
    score = tl.load(SCORE + first + i, mask=there, other=0.0)
    # Integers in the scores' order, above all others the edges, below them what isn't a number.
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(score == 0.0, 0, tl.where(bits < 0, bits ^ _MOST, bits))
    order = tl.where((score == score) & there, order, _LEAST)
    order = tl.where((i == 0) | (i == n - 1), _MOST, order)
    least = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= kept, 0, _LEAST)
    for bit in range(31):
        higher = least + (1 << (30 - bit))
        least = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= kept, higher, least)
    above = order > least
    level = (order == least) & there
    room = kept - tl.sum(above.to(tl.int32), 0)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = tl.cumsum(chosen.to(tl.int32), 0).to(tl.int64) - 1
    where = ROWS + tl.load(KEPT + 2 * document + 1) + place[:, None] * size
    rows = tl.load(DOCUMENTS + 4 * document + 2) + i.to(tl.int64)[:, None] * size
    end = tl.load(DOCUMENTS + 4 * document + 3)
    for start in range(0, size, BS):
        column = start + tl.arange(0, BS)[None, :]
        tl.store(where + column, rows + column, mask=chosen[:, None] & (column < size) & (rows + column < end))
