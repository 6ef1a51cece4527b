"""Lists turned round and tiles of queries, against plain loops; what is shared is made once."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch

from lemo.config import Attend
from lemo.kernels import block_lists
from lemo.kernels.block_lists import BlockLists, KeyLists
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout
from reference import all_boosts, all_listed

DEVICE = torch.device(os.environ.get("LEMO_TEST_DEVICE", "cpu"))
ROWS = {
    "some": torch.tensor([3, 4, 9, 40, 41, 42, 43, 44, 45, 46, 97, 130, 230, 231]),
    "none": torch.arange(0),
    "all": torch.arange(232),
}


def lists_of(settings: dict[str, Any], heads: int = 2) -> BlockLists:
    """Of documents of 150, 1 and 81 tokens, key blocks of 4, some key heads, one query block that sees everything."""
    positions = torch.cat([torch.arange(n) for n in (150, 1, 81)])[None].to(DEVICE)
    layout = build_layout(1, 232, 4, DEVICE, None, positions)
    labelled = torch.arange(232) == 140
    grid = build_grid(layout, Attend(block=4, **settings), heads, None, labelled)
    some = torch.randn(heads, 232, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return choose_blocks(grid, some, some, 1.0, lambda: 7)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 keys aren't the kernel's."""
    monkeypatch.setenv("LEMO_KERNELS", "torch")


LISTS: dict[str, dict[str, Any]] = {
    "random": {"choice": "random", "density": 0.5, "labelled": "dense"},
    "sampled": {"choice": "sampled", "density": 0.5, "labelled": "dense"},
    "nearest": {"choice": "none", "density": 0.5},
    "everything": {"choice": "random", "density": 1.0},
}


def by_loops(lists: BlockLists) -> list[list[list[tuple[int, float]]]]:
    """By key head and key block: query blocks that see it, and the logarithm of its weight for each."""
    grid = lists.grid
    found: list[list[list[tuple[int, float]]]] = [[[] for _ in grid.key_first] for _ in grid.start]
    place = {int(first): j for j, first in enumerate(grid.key_first)}
    listed = all_listed(lists)
    boosts = all_boosts(lists) or [[[0.0] * len(rows) for rows in head] for head in listed]
    for seen, rows, weights in zip(found, listed, boosts, strict=True):
        for i, both in enumerate(zip(rows, weights, strict=True)):
            for first, boost in zip(*both, strict=True):
                seen[place[first]].append((i, boost))
    return found


def listed_by_loops(lists: BlockLists) -> list[list[list[tuple[int, float]]]]:
    """The same without ranges, in which query blocks must be once, in order, and without a weight."""
    grid, found = lists.grid, by_loops(lists)
    ranges = [list(range(*ends)) for ends in zip(grid.query_of_key, grid.range_end, strict=True)]
    for head in found:
        for seen, ranged in zip(head, ranges, strict=True):
            assert [(i, boost) for i, boost in seen if i in ranged] == [(i, 0.0) for i in ranged]
    return [
        [[(i, boost) for i, boost in seen if i not in ranged] for seen, ranged in zip(head, ranges, strict=True)]
        for head in found
    ]


def numbers(found: list[list[list[tuple[int, float]]]]) -> list[list[list[int]]]:
    return [[[i for i, _ in seen] for seen in head] for head in found]


def taken_apart(turned: KeyLists) -> list[list[list[int]]]:
    seers = turned.seers.tolist()
    return [[seers[a:b] for a, b in pairwise(s)] for s in turned.start.tolist()]


def order_of(lengths: list[list[int]]) -> list[int]:
    """Heads that share lists: longest first. Others: what is longer than twice the mean, then head after head."""
    flat = [n for head in lengths for n in head]
    longest = sorted(range(len(flat)), key=lambda place: -flat[place])
    if len(lengths) == 1:
        return longest
    first = [place for place in longest if flat[place] > 2 * sum(flat) / len(flat)]
    return first + [place for place in range(len(flat)) if place not in first]


@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("which", LISTS)
def test_lists_turned_round_are_those_of_loops(which: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "_AT_ONCE", at_once)
    lists = lists_of(LISTS[which])
    turned, weighted = lists.turned, listed_by_loops(lists)
    wanted = numbers(weighted)
    assert (turned.boost is not None) == (which == "sampled")
    if turned.boost is not None:
        assert turned.boost.tolist() == [boost for head in weighted for seen in head for _, boost in seen]
        assert any(turned.boost.tolist())
    assert len(wanted) == (2 if which in ("random", "sampled") else 1)
    assert taken_apart(turned) == wanted
    assert turned.seers.dtype == torch.int32
    assert turned.seers.numel() == len(wanted) * lists.grid.listed.sum()
    lengths = [[len(seen) for seen in head] for head in numbers(by_loops(lists))]
    assert turned.order.tolist() == order_of(lengths)
    if len(wanted) > 1:
        # Some go first, but not all by their lengths.
        by_length = order_of([[n for head in lengths for n in head]])
        assert turned.order.tolist() not in (sorted(by_length), by_length)


@pytest.mark.parametrize("which", LISTS)
def test_what_sees_everything_keeps_others_in_their_ranges(which: str) -> None:
    """Chosen key blocks are listed, and of runs only what one that sees everything sees more than those after it."""
    grid = lists_of(LISTS[which]).grid
    more = grid.listed - grid.chosen
    dense = [i for i, (a, b) in enumerate(zip(grid.query_first, grid.query_end, strict=True)) if a <= 140 < b]
    assert more.nonzero()[0].tolist() == ([] if which == "everything" else dense)
    assert more.max() < grid.count[dense[0]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("which", LISTS)
def test_tiles_that_see_a_key_block_are_those_of_loops(which: str, most: int, rows: str) -> None:
    lists = lists_of(LISTS[which])
    grid, kept = lists.grid, ROWS[rows]
    tiles = grid.tiles(kept, most)
    first, end, block = (x.tolist() for x in (tiles.first, tiles.end, tiles.block))
    cut = [kept[a:b].tolist() for a, b in zip(first, end, strict=True)]
    assert [row for rows in cut for row in rows] == kept.tolist()
    assert all(0 < len(rows) <= most for rows in cut)
    for i, mine in zip(block, cut, strict=True):
        assert grid.query_first[i] <= mine[0] <= mine[-1] < grid.query_end[i]
    spread = lists.spread(tiles)
    weighted = [
        [[(t, boost) for i, boost in seen for t, b in enumerate(block) if b == i] for seen in head]
        for head in listed_by_loops(lists)
    ]
    assert taken_apart(spread) == numbers(weighted)
    if spread.boost is not None:
        assert spread.boost.tolist() == [boost for head in weighted for seen in head for _, boost in seen]
    lengths = [[sum(block.count(i) for i in seen) for seen in head] for head in numbers(by_loops(lists))]
    assert spread.order.tolist() == order_of(lengths)
    ranges = zip(*(x.tolist() for x in (tiles.range_first, tiles.range_full, tiles.range_end)), strict=True)
    for j, (begin, full, stop) in enumerate(ranges):
        last_row = grid.query_end[grid.range_end[j] - 1]
        assert kept[begin:full].tolist() == [row for row in kept if grid.key_first[j] <= row < grid.key_end[j]]
        assert kept[full:stop].tolist() == [row for row in kept if grid.key_end[j] <= row < last_row]


def test_what_layers_share_is_made_once() -> None:
    lists, other = lists_of(LISTS["nearest"]), ROWS["some"].clone()
    grid, kept = lists.grid, ROWS["some"]
    assert lists.turned is lists.turned
    assert grid.tiles(None, 8) is grid.tiles(None, 8)
    tiles = grid.tiles(kept, 8)
    assert grid.tiles(kept, 8) is tiles
    assert grid.tiles(kept, 4) is not tiles
    assert grid.tiles(kept, 8) is tiles
    spread = lists.spread(tiles)
    assert lists.spread(tiles) is spread
    assert grid.tiles(other, 8) is not tiles
    assert lists.spread(grid.tiles(other, 8)) is not spread
    assert grid.tiles(None, 8) is grid.tiles(None, 8)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("which", LISTS)
def test_what_one_layer_made_is_dropped_and_what_layers_share_stays(which: str, heads: int) -> None:
    lists = lists_of(LISTS[which], heads)
    turned = lists.turned
    lists.forget()
    assert (lists.turned is turned) == (which in ("nearest", "everything"))
