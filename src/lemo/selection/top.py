"""The plan of each document's highest blocks, made on the device without waiting for it.

How many blocks a document keeps is known before any score, and only its last block can be short, which is always kept:
so numbers of rows are known too, and ranks alone are the scores' to decide: on a GPU in one kernel.

Shapes: n blocks of the longest document.
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
class _Ranking:
    """What scores don't decide, without the kernel.

    Attributes:
        block: int64 [documents, n], a document's first block, its last, then the others; filled up with any.
        first_row: int64 [documents, n], of these blocks.
        free: bool [documents, n], blocks that are ranked by their score.
        fixed: fp32 [documents, n], the others' rank: edges go first, what fills up last; 0 where free.
        kept: int64 [kept blocks], places in the flattened ranking.
        offset: int64 [block size], rows of a block.
        there: which rows of kept blocks are tokens.
    """

    block: Tensor
    first_row: Tensor
    free: Tensor
    fixed: Tensor
    kept: Tensor
    offset: Tensor
    there: Tensor | slice


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
        rows = _top_rows(score, layout, keep, kept)
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


def _top_rows(score: Tensor, layout: SequenceLayout, keep: float, kept: _Kept) -> Tensor:
    key = ("ranking", keep)
    if key not in layout.made:
        layout.made[key] = _ranking(layout, kept.blocks)
    ranking: _Ranking = layout.made[key]
    # Subtracted, not negated: a negated NaN has a sign, which a radix sort heeds.
    ahead = torch.where(ranking.free, ranking.fixed - score[ranking.block], ranking.fixed)
    first_rows = ranking.first_row.gather(1, ahead.argsort(stable=True)).flatten()[ranking.kept].sort().values
    return (first_rows[:, None] + ranking.offset).flatten()[ranking.there]


def _ranking(layout: SequenceLayout, kept: np.ndarray) -> _Ranking:
    host, device, size = layout.on_host, layout.block_tokens.device, layout.block_size
    blocks = np.array(layout.blocks_per_document)

    def here(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    column, first = np.arange(blocks.max())[None], host.first_block.numpy()[:, None]
    real = column < blocks[:, None]
    block = first + np.where(real, np.where(column == 1, blocks[:, None] - 1, np.maximum(column - 1, 0)), 0)
    fixed = np.where(real, np.where(column < 2, -np.inf, 0.0), np.nan).astype(np.float32)
    # Sorted, each document's last block is the last that it keeps.
    last = kept.cumsum() - 1
    short = size - host.block_tokens.numpy()[host.first_block.numpy() + blocks - 1]
    tokens = (kept * size - short).cumsum()
    there: Tensor | slice = slice(int(tokens[-1]))
    if short[:-1].any():
        full = np.ones((kept.sum(), size), dtype=bool)
        full[last] = np.arange(size) < (size - short)[:, None]
        there = here(np.flatnonzero(full))

    return _Ranking(
        block=here(block),
        first_row=here(host.first_row_of_block.numpy()[block]),
        free=here(real & (column >= 2)),
        fixed=here(fixed),
        kept=here(np.flatnonzero(column < kept[:, None])),
        offset=torch.arange(size, device=device),
        there=there,
    )
