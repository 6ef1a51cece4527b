"""Which blocks of keys each block of queries sees, as the block-sparse kernels take it.

A query block's list is its chosen key blocks, then a run of those that follow each other up to its own end. A
`BlockGrid` is the geometry, the same in every layer: where blocks and runs lie and how many are chosen; it is known on
the host, so that nothing waits for the device. `BlockLists` adds the chosen ones, which may differ by layer and by key
head. Drawn ones stand for others too: their keys' scores get the logarithm of a weight.

The kernels work in tiles of queries of one block; `cut_tiles` cuts any ascending ones, all or some. For the gradients
of keys and values, the query blocks whose runs hold a key block follow each other, its own first: a range, known on the
host too. `turn_round` lists for each key block the other query blocks that see it, and `spread` the tiles of some
queries in these blocks. What depends on the lists or the queries alone is made once.

nq query blocks, nk key blocks over the whole batch, N queries, K key heads, or 1 where they share their lists.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]

# Entries of lists that are turned round at a time: some 50 bytes each until they are done.
_AT_ONCE = 2**24
_ALL = 2**31 - 1
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
class BlockLists:
    """One layer's lists.

    Attributes:
        grid: where blocks lie.
        entries: first rows of chosen key blocks, int32; list i of key head k has `chosen[i]` from `start[k, i]` on.
        boost: logarithm to base 2 of each entry's weight, fp32; None where all are 1.
        shared: whether several layers have them.
    """

    grid: BlockGrid
    entries: Tensor
    boost: Tensor | None = None
    shared: bool = False

    def listed(self, query: Tensor, slot: Tensor, heads: slice = slice(None)) -> Tensor:
        """First rows of the key blocks in these slots of query blocks' lists, int32 [key heads, ...].

        Args:
            query, slot: integers, of shapes that broadcast.
            heads: which key heads.
        """
        past_chosen = (slot - self.grid.here.chosen[query]).int()
        return self._of_chosen(
            self.entries, query, slot, heads, self.grid.here.run[query] + past_chosen * self.grid.key_block
        )

    def boosts(self, query: Tensor, slot: Tensor, heads: slice = slice(None)) -> Tensor | None:
        """`boost` of these slots, 0 in runs; None where there is none."""
        if self.boost is None:
            return None
        return self._of_chosen(self.boost, query, slot, heads, self.boost.new_zeros(()))

    def _of_chosen(self, values: Tensor, query: Tensor, slot: Tensor, heads: slice, other: Tensor) -> Tensor:
        start = self.grid.here.start[heads, query] + slot
        if not len(values):
            return other.expand_as(start)
        return torch.where(slot < self.grid.here.chosen[query], values[start.clamp(max=len(values) - 1)], other)

    @functools.cached_property
    def turned(self) -> KeyLists:
        """`turn_round` of these lists."""
        return turn_round(self)

    @functools.cached_property
    def _spread(self) -> Latest[None, KeyLists]:
        return Latest()

    def spread(self, tiles: RowTiles) -> KeyLists:
        """`turned` by tiles in the query blocks' place; made once until other tiles come."""
        made = self._spread.of(tiles)
        if None not in made:
            made[None] = spread(self.turned, self.grid, tiles)
        return made[None]

    def forget(self) -> None:
        """Drops what a backward made of one layer's lists: all layers' would pile up until the step's end. What layers
        share stays."""
        if not self.shared:
            for name in ("turned", "_spread"):
                self.__dict__.pop(name, None)

    def bias(self, rows: Tensor, first: int, end: int) -> Tensor:
        """What is added to scores of some queries and keys, fp32 [K or 1, N, end - first]: -inf where a query doesn't
        see a key, 0, or its weight's logarithm. Of quadratic size, for plain torch. A query of padding sees nothing.

        Args:
            rows: the queries' rows, int64 [N].
            first, end: rows of the keys.
        """
        grid, device = self.grid, rows.device
        here = grid.here
        block = _block_of(rows, grid.query_first, grid.query_end)
        query = block.clamp(min=0)[:, None]
        # A last column takes what is in no list, and a last key block what lies in none.
        nk, length = len(grid.key_first), int(grid.count.max(initial=0))
        slot = torch.arange(length, device=device)
        listed = (slot < here.count[query]) & (block >= 0)[:, None]
        entry = torch.searchsorted(here.key_first, self.listed(query, slot).contiguous())
        boost = self.boosts(query, slot)
        added = torch.zeros(entry.shape, device=device) if boost is None else boost * math.log(2)
        hits = torch.full((*entry.shape[:2], nk + 1), float("-inf"), device=device)
        hits.scatter_(2, torch.where(listed, entry, nk), added)
        hits[..., nk] = float("-inf")
        keys = torch.arange(first, end, device=device)
        key_block = _block_of(keys, grid.key_first, grid.key_end)
        unseen = keys > rows[:, None]
        if grid.lowest is not None:
            unseen |= keys < on_device(grid.lowest, torch.int64, device)[rows, None]
        return hits[..., torch.where(key_block < 0, nk, key_block)].masked_fill_(unseen, float("-inf"))


def _block_of(rows: Tensor, first: Integers, end: Integers) -> Tensor:
    """The block of each row, -1 where it lies in none; int64."""
    firsts, ends = (on_device(x, torch.int64, rows.device) for x in (first, end))
    block = torch.searchsorted(firsts, rows, right=True) - 1
    return torch.where(rows < ends[block.clamp(min=0)], block, -1)


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


@dataclass(frozen=True, eq=False)
class KeyLists:
    """For each key block the query blocks, or the tiles of queries, that see it and aren't in its range.

    Attributes:
        seers: int32; key block j of key head k has those from `start[k, j]` to `start[k, j + 1]`, ascending.
        start: int64 [K or 1, nk + 1].
        order: key blocks, those that most see first, ranges included, int32 [K or 1, nk].
        boost: logarithm to base 2 of the weight that the key block has for each seer, fp32; None where all are 1.
    """

    seers: Tensor
    start: Tensor
    order: Tensor
    boost: Tensor | None


def turn_round(lists: BlockLists) -> KeyLists:
    """From query blocks' lists of key blocks to key blocks' lists of query blocks.

    Nothing waits for the device: all sizes are known. Takes 4 bytes an entry, and 50 for some heads' at a time.
    """
    grid, device = lists.grid, lists.entries.device
    (heads, nq), nk = grid.start.shape, len(grid.key_first)
    pairs = int(grid.listed.sum())
    # Every (query block, slot of its list) pair beside the ranges', query block by query block.
    query = torch.arange(nq, dtype=torch.int32, device=device)
    query = query.repeat_interleave(on_device(grid.listed, torch.int32, device), output_size=pairs)
    before = on_device(grid.listed.cumsum() - grid.listed, torch.int64, device)
    slot = torch.arange(pairs, device=device) - before[query]
    ends = torch.cat([grid.here.key_first, grid.here.key_first.new_full((1,), _ALL)])
    seers, start = query.new_empty(heads, pairs), slot.new_empty(heads, nk + 1)
    step = max(1, _AT_ONCE // max(1, pairs))
    boost = None if lists.boost is None else lists.boost.new_empty(heads, pairs)
    for k in range(0, heads, step):
        # Stable: a key block's query blocks ascend, so the sums have one order.
        key_row, order = lists.listed(query, slot, slice(k, k + step)).sort(dim=1, stable=True)
        seers[k : k + step] = query[order]
        if boost is not None:
            weights = lists.boosts(query, slot, slice(k, k + step))
            assert weights is not None, "boost isn't"
            boost[k : k + step] = weights.gather(1, order)
        start[k : k + step] = torch.searchsorted(key_row, ends.expand(len(key_row), -1).contiguous())
    start += pairs * torch.arange(heads, device=device)[:, None]
    order = _longest_first(start, grid, np.ones(nq, dtype=np.int64))
    return KeyLists(seers.flatten(), start, order, None if boost is None else boost.flatten())


def spread(turned: KeyLists, grid: BlockGrid, tiles: RowTiles) -> KeyLists:
    """Lists of tiles in the place of lists of the query blocks that these lie in; nothing waits, a head at a time."""
    device = turned.seers.device
    heads, pairs = len(turned.start), int(grid.listed.sum())
    total = int((grid.listed * tiles.per_block).sum())
    per_block = on_device(tiles.per_block, torch.int32, device)
    first = (per_block.cumsum(0) - per_block).int()
    assert total <= _ALL, "tiles of one head are counted in int32"
    seers, start = first.new_empty(heads, total), turned.start.clone()
    boost = None if turned.boost is None else turned.boost.new_empty(heads, total)
    for k, query in enumerate(turned.seers.view(heads, pairs)):
        count = per_block[query]
        # Tiles before each pair's, all pairs' at the end.
        before = torch.nn.functional.pad(count.cumsum(0), (1, 0))
        offset = first[query] - before[:-1].int()
        seers[k] = offset.repeat_interleave(count, output_size=total)
        if boost is not None:
            assert turned.boost is not None, "boost isn't"
            boost[k] = turned.boost.view(heads, pairs)[k].repeat_interleave(count, output_size=total)
        start[k] = before[turned.start[k] - k * pairs] + k * total
    seers += torch.arange(total, dtype=torch.int32, device=device)
    order = _longest_first(start, grid, tiles.per_block)
    return KeyLists(seers.flatten(), start, order, None if boost is None else boost.flatten())


def _longest_first(start: Tensor, grid: BlockGrid, per_block: Integers) -> Tensor:
    """Key blocks by how many see them: those listed, and `per_block` for each query block of the range."""
    before = np.concatenate([[0], per_block.cumsum()])
    ranged = on_device(before[grid.range_end] - before[grid.query_of_key], torch.int64, start.device)
    return (start.diff(dim=1) + ranged).argsort(dim=1, descending=True, stable=True).int()


def on_device(values: NDArray[np.int64] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor there; nothing waits."""
    return torch.as_tensor(values).to(dtype).to(device, non_blocking=True)
