"""The plan of each document's highest blocks, made on the device without waiting for it.

How many blocks a document keeps is known before any score, and only its last block can be short, which is always kept:
so numbers of rows are known too, and ranks alone are the scores' to decide.

Shapes: n blocks of the longest document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lemo.selection.ranking import block_cap, plan_of_everything
from lemo.types import SequenceLayout, TokenPlan


@dataclass(frozen=True)
class _Ranking:
    """What scores don't decide.

    Attributes:
        block: int64 [documents, n], a document's first block, its last, then the others; filled up with any.
        first_row: int64 [documents, n], of these blocks.
        free: bool [documents, n], blocks that are ranked by their score.
        fixed: fp32 [documents, n], the others' rank: edges go first, what fills up last; 0 where free.
        kept: int64 [kept blocks], places in the flattened ranking.
        offset: int64 [block size], rows of a block.
        there: which rows of kept blocks are tokens.
        cu_seqlens: of the plan.
    """

    block: Tensor
    first_row: Tensor
    free: Tensor
    fixed: Tensor
    kept: Tensor
    offset: Tensor
    there: Tensor | slice
    cu_seqlens: tuple[int, ...]


def plan_of_top(score: Tensor, layout: SequenceLayout, keep: float) -> TokenPlan:
    """Keeps each document's first and last block and, up to `keep`, those of highest score; ties go to the earlier.

    Args:
        score: [blocks]; what isn't a number comes last.
        keep: share of each document's blocks.
    """
    key = ("top", keep)
    if key not in layout.made:
        layout.made[key] = _ranking(layout, keep)
    ranking: _Ranking | None = layout.made[key]
    if ranking is None:
        return plan_of_everything(layout)
    # Subtracted, not negated: a negated NaN has a sign, which a radix sort heeds.
    ahead = torch.where(ranking.free, ranking.fixed - score[ranking.block], ranking.fixed)
    first_rows = ranking.first_row.gather(1, ahead.argsort(stable=True)).flatten()[ranking.kept].sort().values
    rows = (first_rows[:, None] + ranking.offset).flatten()[ranking.there]
    return TokenPlan(rows, ranking.cu_seqlens, keep=ranking.cu_seqlens[-1] / layout.real_tokens)


def _ranking(layout: SequenceLayout, keep: float) -> _Ranking | None:
    """None where every block is kept."""
    host, device, size = layout.on_host, layout.block_tokens.device, layout.block_size
    blocks = np.array(layout.blocks_per_document)
    kept = np.maximum(block_cap(layout, keep), np.minimum(blocks, 2))
    if (kept == blocks).all():
        return None

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
        cu_seqlens=(0, *tokens.tolist()),
    )
