"""From block scores to kept rows, and to scores from what predictors make of queries and keys, by a Triton kernel each.

A program takes a document. The least score that is kept is found bit by bit, by counting, so nothing is sorted; a kept
block's place among the kept comes from a running sum. In torch that is nine operations of a few numbers, each of which
costs the host as much as this launch.

n blocks of a document, m width of I(Q) and I(K). `documents`: int64 [documents, 4], each one's first block, blocks,
first row and the row after its last.
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


def later_products(outputs: Tensor, reach: Tensor, documents: Tensor, longest: int) -> Tensor:
    """Each block's I(K) times the sum of I(Q) over what it reaches from it on, by the document's blocks, fp32 [blocks].

    Args:
        outputs: fp32 [blocks, 2·m], I(Q) then I(K), any strides.
        reach: int32 [m], blocks over which I(Q) is summed, the block's own included.
        documents: as above.
        longest: n of the longest document.
    """
    score = torch.empty(len(outputs), device=outputs.device, dtype=torch.float32)
    BN = power_of_2(longest)
    m = outputs.shape[1] // 2
    launch(
        _later_products, (len(documents),), outputs, reach, documents, score, *outputs.stride(),
        M=m, BN=BN, BM=min(power_of_2(m), max(1, _TILE // BN)), num_warps=min(16, max(4, BN // 256)),
    )  # fmt: skip
    return score


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


@triton.jit
def _later_products(
    OUTPUTS, REACH, DOCUMENTS, SCORE, stride, stride_m, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    document = tl.program_id(0)
    first = tl.load(DOCUMENTS + 4 * document)
    n = tl.load(DOCUMENTS + 4 * document + 1).to(tl.int32)
    # From the last block to the first, as the sums grow.
    block = n - 1 - tl.arange(0, BN)
    here = OUTPUTS + (first + block)[:, None] * stride
    score = tl.zeros([BN], tl.float32)
    for start in range(0, M, BM):
        j = start + tl.arange(0, BM)[None, :]
        there = (block >= 0)[:, None] & (j < M)
        query = tl.load(here + j * stride_m, mask=there, other=0.0)
        # What a block no longer reaches is taken off before the sum: it and its place are never far apart.
        reach = tl.minimum(tl.load(REACH + j, mask=j < M, other=1), n)
        gone = block[:, None] + reach
        query -= tl.load(here + reach * stride + j * stride_m, mask=there & (gone < n), other=0.0)
        key = tl.load(here + (j + M) * stride_m, mask=there, other=0.0)
        score += tl.sum(tl.cumsum(query, 0) * key, 1)
    tl.store(SCORE + first + block, score / n, mask=block >= 0)
