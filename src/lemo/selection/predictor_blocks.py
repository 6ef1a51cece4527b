"""Blocks of documents, as predictors see them: pooled, told where they lie, whom they meet, and side by side."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Distances in blocks over which scores change: a block's place is told at each.
_PERIODS = (8, 32, 128, 512)
PLACES = 3 + 2 * len(_PERIODS)
# Equal parts of I(Q) and I(K) meet over so many blocks, the key's own included; the last over the whole document.
_REACHES = (2, 8, 32, 2**31 - 1)
# Scores of parts of blocks under this many tokens cost more than they teach, and the kernel for scores has none.
_LEAST_PART = 16


def part_of(block_size: int) -> int:
    """Tokens of the parts of blocks whose scores attention's predictors learn from: a quarter of a block's.

    Blocks may begin at any part of the document, so that it is several documents to a predictor.
    """
    return next((p for p in (block_size // 4, block_size // 2) if p >= _LEAST_PART and block_size % p == 0), block_size)


def scores_of_blocks(exact: Tensor, parts: int, tokens: Tensor | None) -> Tensor:
    """Pair scores of blocks from those of their parts, [..., n, n] of [..., f, f].

    Args:
        exact: 0 above the diagonal.
        parts: of which a block is made; the last may have fewer.
        tokens: in each part [f] if scores are the mass that a mean query gives; None if they are maxima.
    """
    if parts == 1:
        return exact
    f = exact.shape[-1]
    lacking = -f % parts
    if tokens is not None:
        exact = exact * tokens[:, None]
    padded = F.pad(exact, (0, lacking, 0, lacking))
    of_blocks = padded.unflatten(-1, (-1, parts)).unflatten(-3, (-1, parts))
    if tokens is None:
        return of_blocks.amax((-3, -1))
    return of_blocks.sum((-3, -1)) / F.pad(tokens, (0, lacking)).view(-1, parts).sum(1)[:, None]


def reaches(width: int) -> Tensor:
    """Over how many blocks, the key's own included, each of a pair's outputs meets; int32 [width], ascending."""
    part = (torch.arange(1, width + 1) * len(_REACHES) - 1) // width
    return torch.tensor(_REACHES, dtype=torch.int32)[part]


def pairs_within_reach(query: Tensor, key: Tensor, reach: Sequence[int]) -> Tensor:
    """Products of the outputs that meet, [..., n, n]; query block, key block, 0 above the diagonal.

    Args:
        query, key: [..., n, m].
        reach: of each output, ascending, m.
    """
    index = torch.arange(query.shape[-2], device=query.device)
    before = index[:, None] - index
    total, at = torch.zeros((), device=query.device), 0
    for far, same in itertools.groupby(reach):
        end = at + len(list(same))
        pairs = query[..., at:end] @ key[..., at:end].mT
        total, at = total + pairs.where((before >= 0) & (before < far), 0.0), end
    return total


def within_reach(rows: Tensor, reach: Tensor, *, later: bool) -> Tensor:
    """Sums over the blocks that are met: from each block on (`later`), or up to it; [m, ..., n].

    What leaves the window is taken off before the sum, so that rounding is that of the window's own numbers.

    Args:
        rows: outputs of a document's blocks, [m, ..., n].
        reach: of each output, [m].
    """
    n = rows.shape[-1]
    if later:
        return within_reach(rows.flip(-1), reach, later=False).flip(-1)
    before = torch.arange(n, device=rows.device) - reach[:, None]
    before = torch.where(before < 0, n, before).view(-1, *[1] * (rows.dim() - 2), n).expand(rows.shape)
    return (rows - F.pad(rows, (0, 1)).gather(-1, before)).cumsum(-1)


class Blocks:
    """Blocks of one document of `tokens` rows.

    Args:
        tokens: its length.
        size: tokens per block.
        start: blocks of the document before these rows, not always whole ones.
    """

    def __init__(self, tokens: int, size: int, start: float = 0.0) -> None:
        self.size = size
        self.start = start
        self.whole = tokens // size
        self.count = -(-tokens // size)

    def mean(self, rows_Nr: Tensor) -> Tensor:
        """Over each block's rows, fp32 or wider, [..., n, r] of [..., N, r]."""
        whole, rest = self._parts(rows_Nr)
        wide = torch.promote_types(rows_Nr.dtype, torch.float32)
        mean = whole.mean(-2, dtype=wide)
        return mean if rest is None else torch.cat([mean, rest.mean(-2, keepdim=True, dtype=wide)], -2)

    def pool(self, rows_Nr: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, maximum) over each block's rows, fp32 or wider, [..., n, r] each."""
        whole, rest = self._parts(rows_Nr)
        mean, largest = self.mean(rows_Nr), whole.amax(-2)
        if rest is not None:
            largest = torch.cat([largest, rest.amax(-2, keepdim=True)], -2)
        return mean, largest.to(mean.dtype)

    def _parts(self, rows_Nr: Tensor) -> tuple[Tensor, Tensor | None]:
        """The whole blocks' rows [..., whole, size, r], and those of the last if it is short."""
        end = self.whole * self.size
        whole = rows_Nr[..., :end, :].unflatten(-2, (self.whole, self.size))
        return whole, rows_Nr[..., end:, :] if self.whole < self.count else None

    def places(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where each block lies, [n, PLACES]; nothing of it depends on later blocks."""
        return _places(self.count, device, dtype, self.start)


@functools.lru_cache(maxsize=64)
def _places(count: int, device: torch.device, dtype: torch.dtype, start: float = 0.0) -> Tensor:
    index = start + torch.arange(count, device=device, dtype=torch.float32)
    angles = [2 * math.pi * index / period for period in _PERIODS]
    columns = [torch.ones_like(index), torch.log1p(index) / 4, 1 / (1 + index)]
    columns += [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
    return torch.stack(columns, 1).to(dtype)


@functools.lru_cache(maxsize=64)
def places_of_batch(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """`Blocks.places` of documents of so many blocks, one after the other, fp32."""
    return torch.cat([_places(count, device, torch.float32) for count in counts])


@dataclass(frozen=True)
class Side:
    """Documents side by side.

    Attributes:
        blocks: int64 [documents, n], each one's blocks; those that a short document lacks are `blocks`' number.
        there: int64 [blocks], where the batch's blocks lie in that, flattened.
        counts: fp32 [documents, 1], blocks of each.
    """

    blocks: Tensor
    there: Tensor
    counts: Tensor


@functools.lru_cache(maxsize=64)
def side_by_side(counts: tuple[int, ...], device: torch.device) -> Side:
    """Where blocks of documents of so many lie."""
    number = torch.tensor(counts)[:, None]
    column = torch.arange(max(counts))[None]
    blocks = torch.where(column < number, column + (number.cumsum(0) - number), sum(counts))
    there = (column < number).flatten().nonzero().flatten()
    return Side(*(x.to(device, non_blocking=True) for x in (blocks, there, number.float())))
