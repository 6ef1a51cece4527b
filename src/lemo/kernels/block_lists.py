"""Which blocks of keys each block of queries sees, as the block-sparse kernels take it.

A `BlockGrid` is the geometry, the same in every layer: where blocks lie and how many each list holds; it is known on
the host, so that nothing waits for the device. `BlockLists` adds the lists, which may differ by layer and by key head.
A list holds the first rows of its key blocks, ascending; the last of them lie in the query block itself.

The kernels work in tiles of *lanes*. Lane r·G + g is query r with the g-th of the G heads that share a key head: heads
lie side by side, so a tile is full whether a block has many queries or few. `cut_tiles` cuts any ascending queries, all
or some; `turn_round` lists for each key block the tiles that see it, for the gradients of keys and values.

nq query blocks, nk key blocks over the whole batch, N queries, K key heads, or 1 where they share their lists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


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
        start: where lists start in `BlockLists.entries`, [K or 1, nq].
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
    start: Integers
    device: torch.device

    @functools.cached_property
    def here(self) -> GridTensors:
        """What the kernels read, on the device; staged from pageable memory, so nothing waits."""
        return GridTensors(
            count=on_device(self.count, torch.int32, self.device),
            tail=on_device(self.tail if self.lowest is None else self.count, torch.int32, self.device),
            start=on_device(self.start, torch.int64, self.device),
            key_first=on_device(self.key_first, torch.int32, self.device),
            key_end=on_device(self.key_end, torch.int32, self.device),
        )

    @property
    def padded(self) -> bool:
        """Whether some rows lie in no block."""
        return int((self.query_end - self.query_first).sum()) < self.rows

    @functools.cached_property
    def _tiles_of_all(self) -> dict[tuple[int, int], RowTiles]:
        return {}

    def tiles_of_all(self, group: int, lanes: int) -> RowTiles:
        """The tiles of all rows; made once."""
        key = (group, lanes)
        if key not in self._tiles_of_all:
            self._tiles_of_all[key] = cut_tiles(self, None, group, lanes)
        return self._tiles_of_all[key]


@dataclass(frozen=True, eq=False)
class GridTensors:
    """A grid's numbers on the device; `tail` counts the entries that need a mask."""

    count: Tensor
    tail: Tensor
    start: Tensor
    key_first: Tensor
    key_end: Tensor


@dataclass(frozen=True, eq=False)
class BlockLists:
    """One layer's lists.

    Attributes:
        grid: where blocks lie.
        entries: first rows of key blocks, int32; list i of key head k is `count[i]` of them from `start[k, i]` on.
    """

    grid: BlockGrid
    entries: Tensor

    def seen(self, rows: Tensor, first: int, end: int) -> Tensor:
        """Which of some keys some queries see, bool [K or 1, N, end - first]: of quadratic size, for plain torch.

        A query of padding sees nothing.

        Args:
            rows: the queries' rows, int64 [N].
            first, end: rows of the keys.
        """
        grid, device = self.grid, rows.device
        block = _block_of(rows, grid.query_first, grid.query_end)
        # A last column takes what is in no list, and a last key block what lies in none.
        nk, length = len(grid.key_first), int(grid.count.max(initial=0))
        slot = torch.arange(length, device=device)
        where = (grid.here.start[:, block.clamp(min=0), None] + slot).clamp(max=len(self.entries) - 1)
        listed = (slot < grid.here.count[block.clamp(min=0), None]) & (block >= 0)[:, None]
        entry = torch.searchsorted(grid.here.key_first, self.entries[where])
        hits = torch.zeros(*where.shape[:2], nk + 1, dtype=torch.bool, device=device)
        hits.scatter_(2, torch.where(listed, entry, nk), True)
        hits[..., nk] = False
        keys = torch.arange(first, end, device=device)
        key_block = _block_of(keys, grid.key_first, grid.key_end)
        seen = hits[..., torch.where(key_block < 0, nk, key_block)] & (keys <= rows[:, None])
        if grid.lowest is None:
            return seen
        return seen & (keys >= on_device(grid.lowest, torch.int64, device)[rows, None])


def _block_of(rows: Tensor, first: Integers, end: Integers) -> Tensor:
    """The block of each row, -1 where it lies in none; int64."""
    firsts, ends = (on_device(x, torch.int64, rows.device) for x in (first, end))
    block = torch.searchsorted(firsts, rows, right=True) - 1
    return torch.where(rows < ends[block.clamp(min=0)], block, -1)


@dataclass(frozen=True, eq=False)
class RowTiles:
    """Queries cut into tiles of lanes, each inside one query block.

    Attributes:
        lanes: most lanes of a tile.
        per_block: tiles of each query block, on the host, [nq].
        block: query block of each tile, int32 [tiles].
        first, end: lanes of each tile, int32 [tiles].
        position: each query's row, int32 [N].
        lowest: the first key that each may see, int32 [N]; None where nothing cuts.
    """

    lanes: int
    per_block: Integers
    block: Tensor
    first: Tensor
    end: Tensor
    position: Tensor
    lowest: Tensor | None


def cut_tiles(grid: BlockGrid, host_rows: Tensor | None, group: int, lanes: int) -> RowTiles:
    """Cuts queries into tiles.

    Args:
        grid: where blocks lie.
        host_rows: the queries' rows, int64 [N], ascending, on the CPU; None for all rows.
        group: G, query heads that share a key head.
        lanes: most lanes of a tile.
    """
    if host_rows is None:
        rows, begin, stop = np.arange(grid.rows), grid.query_first, grid.query_end
    else:
        rows = host_rows.numpy()
        begin, stop = np.searchsorted(rows, grid.query_first), np.searchsorted(rows, grid.query_end)
    per_block = -(-(stop - begin) * group // lanes)
    block = np.repeat(np.arange(len(per_block)), per_block)
    place = np.arange(len(block)) - np.repeat(per_block.cumsum() - per_block, per_block)
    first = begin[block] * group + place * lanes
    end = np.minimum(first + lanes, stop[block] * group)
    return RowTiles(
        lanes=lanes,
        per_block=per_block,
        block=on_device(block, torch.int32, grid.device),
        first=on_device(first, torch.int32, grid.device),
        end=on_device(end, torch.int32, grid.device),
        position=on_device(rows, torch.int32, grid.device),
        lowest=None if grid.lowest is None else on_device(grid.lowest[rows], torch.int32, grid.device),
    )


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """For each key block the tiles of queries that see it.

    Attributes:
        tiles: int32; key block j of key head k has those from `start[k, j]` to `start[k, j + 1]`, ascending.
        start: int64 [K or 1, nk + 1].
        head: how many of them, the first, need a mask, int32 [nk]; all where `BlockGrid.lowest` cuts.
        order: key blocks, those with most tiles first, int32 [K or 1, nk].
    """

    tiles: Tensor
    start: Tensor
    head: Tensor
    order: Tensor


def turn_round(lists: BlockLists, tiles: RowTiles) -> KeyTiles:
    """From query blocks' lists of key blocks to key blocks' lists of tiles. Nothing waits: all sizes are known."""
    grid, device = lists.grid, lists.entries.device
    heads, nq = grid.start.shape
    nk = len(grid.key_first)
    count = np.where(tiles.per_block > 0, grid.count, 0)
    pairs, total = int(count.sum()), int((count * tiles.per_block).sum())
    per_block = on_device(tiles.per_block, torch.int64, device)
    # Every (query block, entry) pair, query block by query block.
    query = torch.arange(nq, device=device).repeat_interleave(on_device(count, torch.int64, device), output_size=pairs)
    slot = torch.arange(pairs, device=device) - on_device(count.cumsum() - count, torch.int64, device)[query]
    key_row = lists.entries[grid.here.start[:, query] + slot]
    # Stable: a key block's queries ascend, so the sums have one order.
    key_row, order = key_row.sort(dim=1, stable=True)
    query = query[order]
    # Positions of tiles: pairs before each, times the tiles that each stands for.
    before = torch.nn.functional.pad(per_block[query].cumsum(1), (1, 0))
    ends = torch.cat([grid.here.key_first, grid.here.key_first.new_full((1,), 2**31 - 1)]).expand(heads, nk + 1)
    before += total * torch.arange(heads, device=device)[:, None]
    start = before.gather(1, torch.searchsorted(key_row, ends.contiguous()))
    pair = torch.arange(heads * pairs, device=device)
    pair = pair.repeat_interleave(per_block[query].flatten(), output_size=heads * total)
    first_tile = per_block.cumsum(0) - per_block
    place = torch.arange(heads * total, device=device) - before[:, :-1].flatten()[pair]
    found = first_tile[query.flatten()[pair]] + place
    length = start.diff(dim=1)
    own = on_device(tiles.per_block[grid.query_of_key], torch.int32, device)
    return KeyTiles(
        tiles=found.int(),
        start=start,
        head=own if grid.lowest is None else torch.full_like(own, 2**31 - 1),
        order=length.argsort(dim=1, descending=True, stable=True).int(),
    )


def on_device(values: NDArray[np.int64] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor there; nothing waits."""
    return torch.as_tensor(values).to(dtype).to(device, non_blocking=True)
