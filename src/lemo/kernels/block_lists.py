"""Which blocks of keys each block of queries sees, as the block-sparse kernels take it.

A query block's list is its chosen key blocks, then a run of those that follow each other up to its own end. Where
blocks and runs lie and how many are chosen is `lemo.kernels.block_grid`'s. `BlockLists` adds the chosen ones, which may
differ by layer and by key head. Drawn ones stand for others too: their keys' scores get the logarithm of a weight.

For the gradients of keys and values `turn_round` lists for each key block the query blocks that see it beside those of
its range, and `spread` the tiles of some queries in these blocks. What depends on the lists alone is made once.

nq query blocks, nk key blocks over the whole batch, N queries, K key heads, or 1 where they share their lists.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lemo.kernels.block_grid import BlockGrid, Integers, Latest, RowTiles, on_device

# Entries of lists that are turned round at a time: some 50 bytes each until they are done.
_AT_ONCE = 2**24
_ALL = 2**31 - 1
# Times the mean.
_FAR_MORE = 2


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
class KeyLists:
    """For each key block the query blocks, or the tiles of queries, that see it and aren't in its range.

    Attributes:
        seers: int32; key block j of key head k has those from `start[k, j]` to `start[k, j + 1]`, ascending.
        start: int64 [K or 1, nk + 1].
        order: in which key blocks' turns come, `head * nk + block` or, where heads share it, the block; int32 [K·nk] or
            [nk].
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
    order = _order(start, grid, np.ones(nq, dtype=np.int64))
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
    order = _order(start, grid, tiles.per_block)
    return KeyLists(seers.flatten(), start, order, None if boost is None else boost.flatten())


def _order(start: Tensor, grid: BlockGrid, per_block: Integers) -> Tensor:
    """`KeyLists.order`, by how many see each key block: those listed, and `per_block` for each query block of a range.

    With lists of their own heads go one after the other: programs that run together then read one head's queries, more
    of which lie in L2. But what far more see than most goes first, or it would run on alone at the end. Heads with
    shared lists read the same places, and the longest lists go first.
    """
    before = np.concatenate([[0], per_block.cumsum()])
    ranged = on_device(before[grid.range_end] - before[grid.query_of_key], torch.int64, start.device)
    seen = (start.diff(dim=1) + ranged).flatten()
    if len(start) > 1:
        seen = seen.where(seen > _FAR_MORE * seen.double().mean(), 0)
    return seen.argsort(descending=True, stable=True).int()
