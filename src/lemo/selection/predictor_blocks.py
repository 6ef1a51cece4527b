"""Blocks of documents, as predictors see them: pooled, told where they lie, and documents side by side."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Distances in blocks over which scores change: a block's place is told at each.
_PERIODS = (8, 32, 128, 512)
PLACES = 3 + 2 * len(_PERIODS)


class Blocks:
    """Blocks of one document of `tokens` rows.

    Args:
        tokens: its length.
        size: tokens per block.
    """

    def __init__(self, tokens: int, size: int) -> None:
        self.size = size
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
        return _places(self.count, device, dtype)


@functools.lru_cache(maxsize=64)
def _places(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    index = torch.arange(count, device=device, dtype=torch.float32)
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
