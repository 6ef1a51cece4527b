"""Blocks placed by a given density: for measurements, where what is kept must not depend on random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.selection.ranking import block_cap
from lemo.types import SequenceLayout


def place_blocks(layout: SequenceLayout, labelled: Tensor, keep: float, density: Sequence[float]) -> Tensor:
    """The labelled blocks and, up to the share `keep` of each document's blocks, others placed by density.

    Args:
        layout: documents and blocks.
        labelled: bool [blocks].
        keep: share of the blocks, in (0, 1].
        density: weights of equal stretches of each document's unlabelled blocks, in order; inside a stretch blocks
            lie at equal distances. One number spreads them evenly. A stretch that would need more blocks than it has
            is full, and what it can't hold goes to the others.

    Returns:
        bool [blocks], on the layout's device.
    """
    host = layout.on_host
    kept = labelled.cpu().clone()
    for document, most in enumerate(block_cap(layout, keep)):
        mine = host.document_of_block == document
        free = (~kept & mine).nonzero().flatten()
        count = max(0, most - int(kept[mine].sum()))
        stretches = free.tensor_split(len(density))
        for stretch, here in zip(stretches, _counts(density, [len(s) for s in stretches], count), strict=True):
            kept[stretch[torch.arange(here) * len(stretch) // max(1, here)]] = True
    return kept.to(labelled.device)


def _counts(density: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """`total` shared out by density, at most `sizes` each, by largest remainder."""
    weights = torch.tensor(density, dtype=torch.float64)
    room = torch.tensor(sizes, dtype=torch.float64)
    share = torch.zeros_like(room)
    # Each round fills at least one stretch, or none is over.
    for _ in range(len(sizes)):
        open_ = (share < room) & (weights > 0)
        if not open_.any() or share.sum() >= total:
            break
        share += torch.where(open_, weights, 0.0) / weights[open_].sum() * (total - share.sum())
        share = share.minimum(room)
    counts = share.floor()
    left = total - int(counts.sum())
    # Stretches without weight are the last to take what's left.
    order = torch.where(counts < room, share - counts + (weights > 0), -1.0).argsort(descending=True, stable=True)
    while left > 0 and bool((counts < room).any()):
        for index in order.tolist():
            if left > 0 and counts[index] < room[index]:
                counts[index] += 1
                left -= 1
    return [int(count) for count in counts]
