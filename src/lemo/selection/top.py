"""The plan of each document's highest blocks, made on the device without waiting for it.

How many blocks a document keeps is known before any score, and only its last block can be short, which is always kept:
so numbers of rows are known too, and ranks alone are the scores' to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lemo.selection.ranking import block_cap, plan_of_everything
from lemo.types import SequenceLayout, TokenPlan


@dataclass(frozen=True)
class _Candidates:
    """The batch's blocks in the order in which equal ranks count, int64 [blocks] each.

    Attributes:
        block: of each document its first block, its last, then the others.
        first_row: of these.
        document: of these; None where there is one.
        free: bool, those that are ranked by their score.
    """

    block: Tensor
    first_row: Tensor
    document: Tensor | None
    free: Tensor


@dataclass(frozen=True)
class _Share:
    """What `keep` decides.

    Attributes:
        kept: int64 [kept blocks], places in the ranking.
        there: which rows of kept blocks are tokens.
        cu_seqlens: of the plan.
    """

    kept: Tensor
    there: Tensor | slice
    cu_seqlens: tuple[int, ...]


def plan_of_top(score: Tensor, layout: SequenceLayout, keep: float) -> TokenPlan:
    """Keeps each document's first and last block and, up to `keep`, those of highest score; ties go to the earlier.

    Args:
        score: [blocks]; what isn't a number comes last.
        keep: share of each document's blocks.
    """
    made = layout.made
    if ("top", keep) not in made:
        made["top", keep] = _share(layout, keep)
    share: _Share | None = made["top", keep]
    if share is None:
        return plan_of_everything(layout)
    if "candidates" not in made:
        made["candidates"] = _candidates(layout)
        made["offset"] = torch.arange(layout.block_size, device=score.device)
    among: _Candidates = made["candidates"]
    # Subtracted, not negated: a negated NaN has a sign, which a radix sort heeds.
    order = torch.where(among.free, 0.0 - score[among.block], float("-inf")).argsort(stable=True)
    if among.document is not None:
        order = order[among.document[order].argsort(stable=True)]
    first_rows = among.first_row[order][share.kept].sort().values
    rows = (first_rows[:, None] + made["offset"]).flatten()[share.there]
    return TokenPlan(rows, share.cu_seqlens, keep=share.cu_seqlens[-1] / layout.real_tokens)


def _candidates(layout: SequenceLayout) -> _Candidates:
    host = layout.on_host
    first, document = host.first_block.numpy(), host.document_of_block.numpy()
    blocks = np.array(layout.blocks_per_document)
    place = np.arange(blocks.sum()) - first[document]
    last = first[document] + blocks[document] - 1
    block = np.where(place == 0, first[document], np.where(place == 1, last, first[document] + place - 1))
    device = layout.block_tokens.device
    block, first_row, of, free = (
        torch.from_numpy(x).to(device, non_blocking=True)
        for x in (block, host.first_row_of_block.numpy()[block], document, place >= 2)
    )
    return _Candidates(block, first_row, of if len(blocks) > 1 else None, free)


def _share(layout: SequenceLayout, keep: float) -> _Share | None:
    """None where every block is kept."""
    host, device, size = layout.on_host, layout.block_tokens.device, layout.block_size
    blocks, first = np.array(layout.blocks_per_document), host.first_block.numpy()
    kept = np.maximum(block_cap(layout, keep), np.minimum(blocks, 2))
    if (kept == blocks).all():
        return None

    # Sorted, each document's last block is the last that it keeps.
    last = kept.cumsum() - 1
    short = size - host.block_tokens.numpy()[first + blocks - 1]
    tokens = (kept * size - short).cumsum()
    there: Tensor | slice = slice(int(tokens[-1]))
    if short[:-1].any():
        full = np.ones((kept.sum(), size), dtype=bool)
        full[last] = np.arange(size) < (size - short)[:, None]
        there = torch.from_numpy(np.flatnonzero(full)).to(device, non_blocking=True)
    places = np.repeat(first - (last + 1 - kept), kept) + np.arange(kept.sum())
    return _Share(torch.from_numpy(places).to(device, non_blocking=True), there, (0, *tokens.tolist()))
