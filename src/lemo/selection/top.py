"""The plan of each document's highest blocks, made on the device without waiting for it.

How many blocks a document keeps is known before any score, and only its last block can be short, which is always kept:
so numbers of rows are known too, and ranks alone are the scores' to decide: on a GPU in one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lemo.kernels.dispatch import ranking_backend
from lemo.selection.layout import table_of_documents
from lemo.selection.ranking import block_cap, plan_of_everything
from lemo.types import SequenceLayout, TokenPlan


@dataclass(frozen=True)
class _Kept:
    """How much documents keep.

    Attributes:
        blocks: of each.
        cu_seqlens: of the plan.
        places: int64 [documents, 2], blocks of each and its first place among the kept rows.
    """

    blocks: np.ndarray
    cu_seqlens: tuple[int, ...]
    places: Tensor


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


def plan_of_top(score: Tensor, layout: SequenceLayout, keep: float) -> TokenPlan:
    """Keeps each document's first and last block and, up to `keep`, those of highest score; ties go to the earlier.

    Args:
        score: [blocks]; what isn't a number comes last.
        keep: share of each document's blocks.
    """
    key = ("top", keep)
    if key not in layout.made:
        layout.made[key] = _how_much(layout, keep)
    kept: _Kept | None = layout.made[key]
    if kept is None:
        return plan_of_everything(layout)
    longest, total = max(layout.blocks_per_document), kept.cu_seqlens[-1]
    if ranking_backend(score, longest) == "triton":
        from lemo.kernels.ranking import top_rows

        documents = table_of_documents(layout)
        rows = top_rows(score.contiguous(), documents, kept.places, total, layout.block_size, longest)
    else:
        rows = _top_rows(score, layout, keep, kept.blocks)
    return TokenPlan(rows, kept.cu_seqlens, keep=total / layout.real_tokens)


def _how_much(layout: SequenceLayout, keep: float) -> _Kept | None:
    """None where every block is kept."""
    host = layout.on_host
    blocks = np.array(layout.blocks_per_document)
    kept = np.maximum(block_cap(layout, keep), np.minimum(blocks, 2))
    if (kept == blocks).all():
        return None
    # A document's last block, which alone may be short, is kept.
    last = host.block_tokens.numpy()[host.first_block.numpy() + blocks - 1]
    ends = ((kept - 1) * layout.block_size + last).cumsum()
    places = torch.from_numpy(np.stack([kept, np.append(0, ends[:-1])], 1))
    return _Kept(kept, (0, *ends.tolist()), places.to(layout.block_tokens.device, non_blocking=True))


def _top_rows(score: Tensor, layout: SequenceLayout, keep: float, kept: np.ndarray) -> Tensor:
    made = layout.made
    if "candidates" not in made:
        made["candidates"] = _candidates(layout)
        made["offset"] = torch.arange(layout.block_size, device=score.device)
    if ("places", keep) not in made:
        made["places", keep] = _places(layout, kept)
    among: _Candidates = made["candidates"]
    places, there = made["places", keep]
    # Subtracted, not negated: a negated NaN has a sign, which a radix sort heeds.
    order = torch.where(among.free, 0.0 - score[among.block], float("-inf")).argsort(stable=True)
    if among.document is not None:
        order = order[among.document[order].argsort(stable=True)]
    first_rows = among.first_row[order][places].sort().values
    return (first_rows[:, None] + made["offset"]).flatten()[there]


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


def _places(layout: SequenceLayout, kept: np.ndarray) -> tuple[Tensor, Tensor | slice]:
    """Kept blocks' places in the ranking, int64, and which of their rows are tokens."""
    host, device, size = layout.on_host, layout.block_tokens.device, layout.block_size
    blocks, first = np.array(layout.blocks_per_document), host.first_block.numpy()
    # Sorted, each document's last block is the last that it keeps.
    last = kept.cumsum() - 1
    short = size - host.block_tokens.numpy()[first + blocks - 1]
    there: Tensor | slice = slice(int((kept * size - short).sum()))
    if short[:-1].any():
        full = np.ones((kept.sum(), size), dtype=bool)
        full[last] = np.arange(size) < (size - short)[:, None]
        there = torch.from_numpy(np.flatnonzero(full)).to(device, non_blocking=True)
    places = np.repeat(first - (last + 1 - kept), kept) + np.arange(kept.sum())
    return torch.from_numpy(places).to(device, non_blocking=True), there
