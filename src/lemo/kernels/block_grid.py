"""Where blocks of queries and keys lie, and queries cut into tiles: the geometry of block-sparse attention, the same in
every layer. It is known on the host, so that nothing waits for the device.

A query block's list (`lemo.kernels.block_lists`) is its chosen key blocks, then a run of those that follow each other
up to its own end. The query blocks whose runs hold a key block follow each other, its own first: a range. The kernels
work in tiles of queries of one block; `cut_tiles` cuts any ascending ones, all or some, once for whoever shares them.

nq query blocks, nk key blocks over the whole batch, N queries, M rows, K key heads, or 1 where they share their lists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Where blocks lie, and the lists' lengths.

    Attributes:
        documents: (first, end) rows of each document.
        rows: M, those of padding included.
        key_block: tokens of a key block (a document's last may have fewer).
        lowest: the first key that each row may see, beside what the lists say, [M]; None where a list says it all.
        query_first, query_end: rows of each query block, [nq].
        key_first, key_end: rows of each key block, [nk].
        query_of_key: the query block in which each key block lies, [nk].
        count: length of each query block's list, [nq].
        tail: how many of it, the last, lie in the query block itself, [nq].
        chosen: how many of it, the first, aren't part of the run, [nq].
        start: where chosen ones start in `BlockLists.entries`, [K or 1, nq].
        device: of the tensors.
    """

    documents: tuple[tuple[int, int], ...]
    rows: int
    key_block: int
    lowest: Integers | None
    query_first: Integers
    query_end: Integers
    key_first: Integers
    key_end: Integers
    query_of_key: Integers
    count: Integers
    tail: Integers
    chosen: Integers
    start: Integers
    device: torch.device

    @functools.cached_property
    def here(self) -> GridTensors:
        """What the kernels read, on the device; staged from pageable memory, so nothing waits."""
        return GridTensors(
            count=on_device(self.count, torch.int32, self.device),
            chosen=on_device(self.chosen, torch.int32, self.device),
            start=on_device(self.start, torch.int64, self.device),
            run=on_device(self.run, torch.int32, self.device),
            key_first=on_device(self.key_first, torch.int32, self.device),
            key_end=on_device(self.key_end, torch.int32, self.device),
            query_first=on_device(self.query_first, torch.int32, self.device),
            query_end=on_device(self.query_end, torch.int32, self.device),
        )

    @functools.cached_property
    def run(self) -> Integers:
        """First row of each query block's run, [nq]."""
        return self.query_first - (self.count - self.tail - self.chosen) * self.key_block

    @functools.cached_property
    def ranged(self) -> Integers:
        """From which row on each run belongs to ranges, [nq]: nowhere before an earlier query block's, so that those
        whose runs hold a key block follow each other. What one that sees everything sees more is listed instead."""
        return np.maximum.accumulate(self.run)

    @functools.cached_property
    def listed(self) -> Integers:
        """How many of each query block's list, the first, belong to no range, [nq]."""
        return self.chosen + (self.ranged - self.run) // self.key_block

    @functools.cached_property
    def range_end(self) -> Integers:
        """One past the last query block of each key block's range, which `query_of_key` begins, [nk]."""
        return np.searchsorted(self.ranged, self.key_first, side="right")

    @property
    def padded(self) -> bool:
        """Whether some rows lie in no block."""
        return int((self.query_end - self.query_first).sum()) < self.rows

    @property
    def longest(self) -> int:
        """Most rows of a query block."""
        return int((self.query_end - self.query_first).max(initial=0))

    @functools.cached_property
    def _tiles_of_all(self) -> dict[int, RowTiles]:
        return {}

    @functools.cached_property
    def _tiles_of_some(self) -> Latest[int, RowTiles]:
        return Latest()

    def tiles(self, host_rows: Tensor | None, most: int) -> RowTiles:
        """`cut_tiles`, once for all rows, and once for some that layers or kernels after each other share."""
        made = self._tiles_of_all if host_rows is None else self._tiles_of_some.of(host_rows)
        if most not in made:
            made[most] = cut_tiles(self, host_rows, most)
        return made[most]


@dataclass(frozen=True, eq=False)
class GridTensors:
    """A grid's numbers on the device; `run`: first rows of runs."""

    count: Tensor
    chosen: Tensor
    start: Tensor
    run: Tensor
    key_first: Tensor
    key_end: Tensor
    query_first: Tensor
    query_end: Tensor


@dataclass(frozen=True, eq=False)
class RowTiles:
    """Queries cut into tiles, each inside one query block.

    Attributes:
        per_block: tiles of each query block, on the host, [nq].
        block: query block of each tile, int32 [tiles].
        first, end: queries of each tile, int32 [tiles].
        position: each query's row, int32 [N].
        lowest: the first key that each may see, int32 [N]; None where nothing cuts.
        range_first, range_full, range_end: of each key block's range, the first query that is in the key block or after
            it, the first after it, and one past the last, int32 [nk].
    """

    per_block: Integers
    block: Tensor
    first: Tensor
    end: Tensor
    position: Tensor
    lowest: Tensor | None
    range_first: Tensor
    range_full: Tensor
    range_end: Tensor


def cut_tiles(grid: BlockGrid, host_rows: Tensor | None, most: int) -> RowTiles:
    """Cuts queries into tiles.

    Args:
        grid: where blocks lie.
        host_rows: the queries' rows, int64 [N], ascending, on the CPU; None for all rows.
        most: queries of a tile.
    """
    rows = np.arange(grid.rows) if host_rows is None else host_rows.numpy()

    def query_at(row: Integers) -> Integers:
        return row if host_rows is None else np.searchsorted(rows, row)

    begin, stop = query_at(grid.query_first), query_at(grid.query_end)
    per_block = -(-(stop - begin) // most)
    block = np.repeat(np.arange(len(per_block)), per_block)
    first = begin[block] + (np.arange(len(block)) - np.repeat(per_block.cumsum() - per_block, per_block)) * most
    return RowTiles(
        per_block=per_block,
        block=on_device(block, torch.int32, grid.device),
        first=on_device(first, torch.int32, grid.device),
        end=on_device(np.minimum(first + most, stop[block]), torch.int32, grid.device),
        position=on_device(rows, torch.int32, grid.device),
        lowest=None if grid.lowest is None else on_device(grid.lowest[rows], torch.int32, grid.device),
        range_first=on_device(query_at(grid.key_first), torch.int32, grid.device),
        range_full=on_device(query_at(grid.key_end), torch.int32, grid.device),
        range_end=on_device(stop[grid.range_end - 1], torch.int32, grid.device),
    )


class Latest(Generic[KeyT, ValueT]):
    """What was made for one object, until another takes its place."""

    def __init__(self) -> None:
        self._object: object = None
        self._made: dict[KeyT, ValueT] = {}

    def of(self, this: object) -> dict[KeyT, ValueT]:
        """What was made for this very object; nothing yet if it's a new one."""
        if this is not self._object:
            self._object, self._made = this, {}
        return self._made


def on_device(values: NDArray[np.int64] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor there; nothing waits."""
    return torch.as_tensor(values).to(dtype).to(device, non_blocking=True)
