"""Which key blocks each block of queries sees on the `attend` axis.

A query block sees itself, the blocks before it that make up its local window, its document's first block, and distant
blocks chosen for it; all causally, inside its document, and inside a sliding window where the layer has one. Each query
block gets the same number of blocks before its own, so that the lists' lengths, and with them the density, are known
before anything is computed and don't depend on how blocks are chosen: methods compare at equal work.

`pooled` takes the blocks with the highest `pooled_mass`; the softmax comes before the mean over a group's heads, so
that a head that looks nearby has no say about distant blocks. `sampled` draws blocks with probability by their
`looked_mass` and weighs each by 1/probability, so that the sums over keys, numerator and denominator of the softmax,
are estimated without bias: what a window or the highest blocks leave out is a bias that training learns
(docs/decisions/0011). Each key head has its own lists. Rejected: one list for all heads (heads look at different
places, and lists by key head cost the kernel nothing); exact block scores (as much work as attention itself); a mean
over heads of q·k (heads with large scores would decide alone).

Blocks count from each document's first token. K key heads, H query heads, d head size; nq, nk blocks of one document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from lemo.config import QUERY_BLOCKS, Attend
from lemo.kernels.block_grid import BlockGrid, Integers, on_device
from lemo.kernels.block_lists import BlockLists
from lemo.selection.attend_mass import looked_at, looked_mass, pool, pooled_mass, scores_of_looked
from lemo.selection.sampling import draw_systematically, inclusion_probabilities
from lemo.types import SequenceLayout, TokenPlan

_SCORES_AT_ONCE = 2**26
# Of a `sampled` choice, the share that is drawn evenly: an estimate of a block's mass may be far too low.
_EVENLY = 0.1
# Key blocks, int64 [K or 1, n, chosen], and logarithms of their weights to base 2, or None.
Chosen = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Choosers:
    """The query blocks of one document that don't see everything before them.

    Attributes:
        first, end: the document's rows.
        block: which query blocks, int64 [n].
        lowest: the first key block that each may see, [n].
        nearest: blocks of the window before a query block's own.
        chosen: blocks that each sees before its window, the document's first included.
    """

    first: int
    end: int
    block: Integers
    lowest: Integers
    nearest: int
    chosen: int


# (choosers, query blocks [n], the first key block that each sees [n], nk) -> scores, [K, n, nk].
Score = Callable[[Choosers, Tensor, Tensor, int], Tensor]
# (scores, which are distant [n, nk], how many) -> the choice.
Pick = Callable[[Tensor, Tensor, int], Chosen]


@dataclass(frozen=True, eq=False)
class AttendGrid:
    """What is the same in all layers with the same sliding window.

    Attributes:
        grid: where blocks lie, and the lists' lengths.
        choosers: of each document that has some.
        attend: the configuration.
        causal_pairs: of queries and keys, in all documents; blocks at the edge of a sliding window count whole.
    """

    grid: BlockGrid
    choosers: tuple[Choosers, ...]
    attend: Attend
    causal_pairs: float

    @functools.cached_property
    def density(self) -> float:
        """Share of causal attention that is computed."""
        return self.pairs(None) / self.causal_pairs

    def pairs(self, host_rows: Tensor | None) -> float:
        """Pairs of queries and keys that are computed, counted as `causal_pairs` are.

        Args:
            host_rows: the queries' rows, ascending, on the CPU; None for all that lie in documents.
        """
        grid = self.grid
        first, end = grid.query_first, grid.query_end
        if host_rows is None:
            queries = end - first
            own = float((queries * (queries + 1) // 2).sum())
        else:
            rows = host_rows.numpy()
            queries = np.searchsorted(rows, end) - np.searchsorted(rows, first)
            own = float((rows - np.repeat(first, queries) + 1).sum())
        return own + float((queries * (grid.count - grid.tail)).sum()) * grid.key_block

    @functools.cached_property
    def nearest_lists(self) -> BlockLists:
        """The document's first block, or where it can't be seen the next one, before a window; for all heads."""

        def nearest(choosers: Choosers) -> Chosen:
            assert choosers.chosen == 1, "the others are the window"
            next_one = choosers.block * QUERY_BLOCKS - choosers.nearest - 1
            seen = np.where(choosers.lowest > 0, next_one, 0)
            return on_device(seen, torch.int64, self.grid.device)[None, :, None], None

        return replace(_lists(self, nearest), shared=True)

    def bare(self) -> AttendGrid:
        """The same without what was made of it on the device."""
        return replace(self, grid=replace(self.grid))


def build_grid(
    layout: SequenceLayout, attend: Attend, heads: int, window: int | None, labelled: Tensor | None = None
) -> AttendGrid:
    """Where blocks lie in a batch and how many each query block sees.

    Args:
        layout: documents.
        attend: what is asked of the layer.
        heads: K.
        window: the layer's sliding window in tokens, or None.
        labelled: bool [B·T] on the CPU, rows whose query blocks see everything; None for none.
    """
    lowest = np.arange(layout.rows) - window + 1 if _cuts(window, layout) else None
    return _build(layout.documents, layout.rows, layout.block_of_row.device, attend, heads, lowest, labelled)


def build_grid_of_kept(
    layout: SequenceLayout,
    plan: TokenPlan,
    attend: Attend,
    heads: int,
    window: int | None,
    labelled: Tensor | None = None,
) -> AttendGrid:
    """The same among kept tokens alone: a document is what is kept of it, in order; rows count kept tokens.

    The sliding window stays one of original positions.

    Args:
        layout, attend, heads, window, labelled: as above, of all rows.
        plan: keeps whole blocks of `attend.block` tokens, but for documents' last.
    """
    lowest = None
    if _cuts(window, layout):
        rows = plan.host_rows.numpy()
        lowest = np.searchsorted(rows, rows - window + 1)
    documents = [(begin, end) for begin, end in pairwise(plan.cu_seqlens) if begin < end]
    marked = None if labelled is None else labelled[plan.host_rows]
    return _build(documents, plan.cu_seqlens[-1], layout.block_of_row.device, attend, heads, lowest, marked)


def _cuts(window: int | None, layout: SequenceLayout) -> TypeGuard[int]:
    return window is not None and window < max(end - first for first, end in layout.documents)


def _build(
    documents: Sequence[tuple[int, int]],
    rows: int,
    device: torch.device,
    attend: Attend,
    heads: int,
    lowest_row: Integers | None,
    labelled: Tensor | None,
) -> AttendGrid:
    size, wide = attend.block, attend.block * QUERY_BLOCKS
    heads = 1 if attend.choice == "none" else heads
    parts: list[dict[str, Integers]] = []
    choosers: list[Choosers] = []
    stored = queries_before = 0
    causal = 0.0
    for first, end in documents:
        key_first, query_first = np.arange(first, end, size), np.arange(first, end, wide)
        query_end = np.minimum(query_first + wide, end)
        block = np.arange(len(query_first))
        lowest = np.zeros_like(block)
        if lowest_row is not None:
            lowest = np.maximum(lowest_row[query_first] - first, 0) // size
        before = block * QUERY_BLOCKS - lowest
        own = np.minimum((block + 1) * QUERY_BLOCKS, len(key_first)) - block * QUERY_BLOCKS
        queries = query_end - query_first
        own_pairs = float((queries * (queries + 1) // 2).sum())
        causal += float((queries * size * before).sum()) + own_pairs
        most, nearest = _budget(attend, before, queries * size, own_pairs)
        everything = before <= most
        if labelled is not None:
            everything |= np.add.reduceat(labelled[first:end].numpy().astype(np.int64), block * wide) > 0
        choosing = block[~everything]
        if len(choosing):
            choosers.append(Choosers(first, end, choosing, lowest[choosing], nearest, most - nearest))
        # What sees everything has a run alone.
        chosen = np.where(everything, 0, most - nearest)
        start = np.zeros((heads, len(block)), dtype=np.int64)
        start[:, choosing] = stored + (most - nearest) * np.arange(heads * len(choosing)).reshape(heads, -1)
        stored += heads * len(choosing) * (most - nearest)
        parts.append(
            {
                "query_first": query_first,
                "query_end": query_end,
                "key_first": key_first,
                "key_end": np.minimum(key_first + size, end),
                "query_of_key": queries_before + np.arange(len(key_first)) // QUERY_BLOCKS,
                "count": np.where(everything, before, most) + own,
                "tail": own,
                "chosen": chosen,
                "start": start,
            }
        )
        queries_before += len(block)
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    if not choosers:
        # Every list is a run.
        joined["start"] = joined["start"][:1]
    grid = BlockGrid(documents=tuple(documents), rows=rows, key_block=size, lowest=lowest_row, device=device, **joined)
    return AttendGrid(grid, tuple(choosers), attend, causal)


def _budget(attend: Attend, before: Integers, pairs: Integers, own_pairs: float) -> tuple[int, int]:
    """Blocks before its own that each query block sees, and how many of them are its window.

    As many as the density allows, but never fewer than the window and the document's first block.

    Args:
        attend: what is asked for.
        before: blocks before each query block, [nq].
        pairs: of queries and keys in one block before each, [nq].
        own_pairs: inside the query blocks themselves.
    """
    asked = None if attend.window is None else -(-attend.window // attend.block)
    least = 2 if asked is None else asked + 1
    most = least
    if attend.density is not None:
        assert not isinstance(attend.density, tuple), "a layer's own: Attend.of_layer"
        # What each further block costs: a pair for every query block that has one.
        by_depth = np.bincount(before, weights=pairs, minlength=1)
        cost = by_depth[::-1].cumsum()[::-1][1:].cumsum()
        allowed = attend.density * (own_pairs + float((before * pairs).sum())) - own_pairs
        most = max(least, int(np.searchsorted(cost, allowed * (1 + 1e-12), side="right")))
    if attend.choice == "none":
        return most, most - 1
    return most, most // 2 if asked is None else asked


def choose_blocks(
    attend: AttendGrid, q_HNd: Tensor, k_KMd: Tensor, scale: float, draw: Callable[[], int] | None = None
) -> BlockLists:
    """One layer's lists.

    Args:
        attend: where blocks lie.
        q_HNd, k_KMd: positioned queries and keys of all rows.
        scale: factor on q·k.
        draw: gives the seed of a random choice.
    """
    choice = attend.attend.choice
    if choice == "none" or not attend.choosers:
        return attend.nearest_lists
    K, device = k_KMd.shape[0], q_HNd.device
    generator = torch.Generator(device)
    if choice != "pooled":
        assert draw is not None, "a random choice needs a seed"
        generator.manual_seed(draw())
    size = attend.attend.block
    count = looked_at(attend.attend.look, QUERY_BLOCKS * size)
    pools: dict[int, tuple[Tensor, Tensor]] = {}

    def any_one(choosers: Choosers, block: Tensor, lowest: Tensor, blocks: int) -> Tensor:
        return torch.rand(K, len(block), blocks, generator=generator, device=device)

    def pooled(choosers: Choosers, block: Tensor, lowest: Tensor, blocks: int) -> Tensor:
        rows = slice(choosers.first, choosers.end)
        if choosers.first not in pools:
            pools.clear()
            pools[choosers.first] = pool(q_HNd[:, rows], QUERY_BLOCKS * size), pool(k_KMd[:, rows], size)
        return pooled_mass(*pools[choosers.first], block, lowest, scale)

    def looked(choosers: Choosers, block: Tensor, lowest: Tensor, blocks: int) -> Tensor:
        rows = slice(choosers.first, choosers.end)
        return looked_mass(q_HNd[:, rows], k_KMd[:, rows], block, lowest, scale, QUERY_BLOCKS * size, size, count)

    ways: dict[str, tuple[Score, Pick]] = {
        "random": (any_one, _highest),
        "pooled": (pooled, _highest),
        "sampled": (looked, functools.partial(_drawn, generator)),
    }
    score, pick = ways[choice]
    # Counted by their peaks: scores, their softmax, and of a draw a dozen arrays, some of them fp64.
    numbers = {
        "random": 3 * K,
        "pooled": 3 * q_HNd.shape[0],
        "sampled": scores_of_looked(q_HNd, k_KMd, size, count) + 16 * K,
    }
    # As much memory as the queries take, or 256 MiB: small parts leave most of a GPU idle.
    pairs = max(_SCORES_AT_ONCE, q_HNd.numel() // 2) // numbers[choice]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _lists(attend, functools.partial(_in_parts, attend, pairs, score, pick))


def _lists(attend: AttendGrid, choose: Callable[[Choosers], Chosen]) -> BlockLists:
    """Lists of the blocks that `choose` finds for a document's choosers."""
    size, grid = attend.attend.block, attend.grid
    if not attend.choosers:
        return BlockLists(grid, torch.empty(0, dtype=torch.int32, device=grid.device))
    found = [(choosers.first, *choose(choosers)) for choosers in attend.choosers]
    entries = torch.cat([(first + size * block).int().flatten() for first, block, _ in found])
    boosts = [boost.flatten() for _, _, boost in found if boost is not None]
    return BlockLists(grid, entries, torch.cat(boosts) if boosts else None)


def _in_parts(attend: AttendGrid, pairs: int, score: Score, pick: Pick, choosers: Choosers) -> Chosen:
    """Blocks picked by their scores, for some choosers at a time.

    Args:
        attend: where blocks lie.
        pairs: of a query block and a key block, scored at a time.
        score, pick: the way.
        choosers: who chooses.
    """
    nk, n = -(-(choosers.end - choosers.first) // attend.attend.block), len(choosers.block)
    step = max(1, pairs // nk)
    keys, found = torch.arange(nk, device=attend.grid.device), []
    for i in range(0, n, step):
        part = slice(i, i + step)
        block, lowest = (on_device(x[part], torch.int64, keys.device) for x in (choosers.block, choosers.lowest))
        distant = (keys >= lowest[:, None]) & (keys < block[:, None] * QUERY_BLOCKS - choosers.nearest)
        found.append(pick(score(choosers, block, lowest, nk), distant, choosers.chosen))
    blocks = torch.cat([block for block, _ in found], 1)
    boosts = [boost for _, boost in found if boost is not None]
    return blocks, torch.cat(boosts, 1) if boosts else None


def _highest(score: Tensor, distant: Tensor, count: int) -> Chosen:
    """The first block where it may be seen, then the highest."""
    first = torch.arange(score.shape[-1], device=score.device) == 0
    score = score.masked_fill(~distant, float("-inf")).masked_fill(distant & first, float("inf"))
    return score.topk(count, sorted=False).indices.sort().values, None


def _drawn(generator: torch.Generator, score: Tensor, distant: Tensor, count: int) -> Chosen:
    """The first block where it may be seen, then blocks drawn by their scores, each for 1/probability of its like."""
    first = distant[:, 0].long()
    others = distant & (torch.arange(score.shape[-1], device=score.device) > 0)
    share = score.float().masked_fill(~others, 0.0)
    # All of it may underflow: the draw is even then.
    whole = share.sum(-1, keepdim=True)
    share = torch.where(whole > 0, (1 - _EVENLY) * share / whole, 0.0) + _EVENLY * others / others.sum(-1, keepdim=True)
    probability = inclusion_probabilities(share, (count - first).expand(score.shape[:-1]))
    shift = torch.rand(*score.shape[:-1], 1, generator=generator, device=score.device, dtype=torch.float64)
    # A row that sees the first block draws one fewer: its places start one later.
    drawn = draw_systematically(probability, count, shift - first[:, None])
    boost = -probability.gather(-1, drawn).log2()
    certain = (torch.arange(count, device=score.device) == 0) & (first == 1)[:, None]
    return drawn.masked_fill(certain, 0), boost.masked_fill(certain, 0.0)
