"""Which key blocks each block of queries sees on the `attend` axis.

A query block sees itself, the blocks before it that make up its local window, its document's first block, and distant
blocks chosen for it; all causally, inside its document, and inside a sliding window where the layer has one. Each query
block gets the same number of blocks before its own, so that the lists' lengths, and with them the density, are known
before anything is computed and don't depend on how blocks are chosen: methods compare at equal work.

`pooled`: the mean of a query block's queries against the mean of a key block's keys, softmax over all blocks that the
query block may see, mean over the query heads that share a key head; each key head has its own lists. The softmax comes
before the mean, so that a head that looks nearby has no say about distant blocks. Rejected: one list for all heads
(heads look at different places, and lists by key head cost the kernel nothing); exact block scores (as much work as
attention itself); a mean over heads of q·k (heads with large scores would decide alone).

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
from lemo.kernels.block_lists import BlockGrid, BlockLists, Integers, on_device
from lemo.types import SequenceLayout, TokenPlan

_SCORES_AT_ONCE = 2**26


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

        def nearest(choosers: Choosers) -> Tensor:
            assert choosers.chosen == 1, "the others are the window"
            next_one = choosers.block * QUERY_BLOCKS - choosers.nearest - 1
            seen = np.where(choosers.lowest > 0, next_one, 0)
            return on_device(seen, torch.int64, self.grid.device)[None, :, None]

        return _lists(self, nearest)

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
    weights = []
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
        certain = (lowest == 0).astype(np.int64)
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
                "certain": certain,
            }
        )
        weights.append(np.where(everything, 1, (before - nearest - certain) / np.maximum(most - nearest - certain, 1)))
        queries_before += len(block)
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    if not choosers:
        # Every list is a run.
        joined["start"] = joined["start"][:1]
    grid = BlockGrid(
        documents=tuple(documents),
        rows=rows,
        key_block=size,
        lowest=lowest_row,
        weight=np.concatenate(weights) if attend.choice == "sampled" else None,
        device=device,
        **joined,
    )
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
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if choice in ("random", "sampled"):
            assert draw is not None, "a random choice needs a seed"
            generator = torch.Generator(device).manual_seed(draw())
            if choice == "sampled":
                return _lists(attend, functools.partial(_sampled, K, generator))

            def drawn(choosers: Choosers, part: slice, blocks: int) -> Tensor:
                return torch.rand(K, len(choosers.block[part]), blocks, generator=generator, device=device)

            return _lists(attend, functools.partial(_highest, attend, K, drawn))
        pools: dict[int, tuple[Tensor, Tensor]] = {}

        def pooled(choosers: Choosers, part: slice, blocks: int) -> Tensor:
            rows = slice(choosers.first, choosers.end)
            if choosers.first not in pools:
                size = attend.attend.block
                pools.clear()
                pools[choosers.first] = pool(q_HNd[:, rows], QUERY_BLOCKS * size), pool(k_KMd[:, rows], size)
            return _pooled_mass(*pools[choosers.first], choosers, part, scale)

        return _lists(attend, functools.partial(_highest, attend, q_HNd.shape[0], pooled))


def pool(x_HTd: Tensor, size: int) -> Tensor:
    """Means over blocks of one document, fp32 or wider, [H, blocks, d]; the last block may be short."""
    wide = torch.promote_types(x_HTd.dtype, torch.float32)
    whole = x_HTd.shape[1] // size * size
    mean = x_HTd[:, :whole].unflatten(1, (-1, size)).mean(2, dtype=wide) if whole else None
    if whole == x_HTd.shape[1]:
        assert mean is not None, "a document has tokens"
        return mean
    rest = x_HTd[:, whole:].mean(1, keepdim=True, dtype=wide)
    return rest if mean is None else torch.cat([mean, rest], 1)


def _pooled_mass(q_Hqd: Tensor, k_Kkd: Tensor, choosers: Choosers, part: slice, scale: float) -> Tensor:
    """Estimated softmax mass that query blocks give to key blocks, mean over the heads of a group, [K, n, nk]."""
    K, nk, _ = k_Kkd.shape
    block, lowest = (on_device(x[part], torch.int64, q_Hqd.device) for x in (choosers.block, choosers.lowest))
    keys = torch.arange(nk, device=q_Hqd.device)
    unseen = (keys < lowest[:, None]) | (keys >= (block[:, None] + 1) * QUERY_BLOCKS)
    logits = q_Hqd[:, block].unflatten(0, (K, -1)) @ k_Kkd[:, None].transpose(-1, -2) * scale
    return logits.masked_fill_(unseen, float("-inf")).softmax(-1).mean(1)


def _lists(attend: AttendGrid, choose: Callable[[Choosers], Tensor]) -> BlockLists:
    """Lists of chosen blocks.

    Args:
        attend: where blocks lie.
        choose: one document's choosers -> their chosen key blocks, int64 [K or 1, n, chosen], certain ones first.
    """
    size, grid = attend.attend.block, attend.grid
    rows = [(choosers.first + size * choose(choosers)).int().flatten() for choosers in attend.choosers]
    return BlockLists(grid, torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32, device=grid.device))


def _sampled(K: int, generator: torch.Generator, choosers: Choosers) -> Tensor:
    """The first block where it may be seen, then distant ones at equal distances from a random one on.

    Every distant block is as likely as every other, and none comes twice.
    """
    device = generator.device
    block, lowest = (on_device(x, torch.int64, device) for x in (choosers.block, choosers.lowest))
    certain = (lowest == 0).long()
    distant = block * QUERY_BLOCKS - choosers.nearest - lowest - certain
    count = choosers.chosen - certain
    shift = torch.rand(K, len(block), 1, generator=generator, device=device, dtype=torch.float64)
    slot = torch.arange(choosers.chosen, device=device) - certain[:, None]
    drawn = ((slot + shift) * (distant / count)[:, None]).long().minimum(distant[:, None] - 1)
    return torch.where(slot < 0, 0, lowest[:, None] + certain[:, None] + drawn)


def _highest(
    attend: AttendGrid, at_once: int, score: Callable[[Choosers, slice, int], Tensor], choosers: Choosers
) -> Tensor:
    """The blocks with the highest scores, as `_lists` wants them.

    Args:
        attend: where blocks lie.
        at_once: heads that have scores at the same time.
        score: (choosers, part of them, nk) -> scores, [K or 1, n, nk].
        choosers: who chooses.
    """
    nk, n = -(-(choosers.end - choosers.first) // attend.attend.block), len(choosers.block)
    step = max(1, _SCORES_AT_ONCE // (nk * at_once))
    parts = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    return torch.cat([_highest_of(score(choosers, part, nk), choosers, part) for part in parts], 1)


def _highest_of(score: Tensor, choosers: Choosers, part: slice) -> Tensor:
    """The first where it may be seen, then the highest."""
    block, lowest = (on_device(x[part], torch.int64, score.device) for x in (choosers.block, choosers.lowest))
    keys = torch.arange(score.shape[-1], device=score.device)
    distant = (keys >= lowest[:, None]) & (keys < block[:, None] * QUERY_BLOCKS - choosers.nearest)
    score = score.masked_fill(~distant, float("-inf")).masked_fill(distant & (keys == 0), float("inf"))
    return score.topk(choosers.chosen, sorted=False).indices.sort().values
