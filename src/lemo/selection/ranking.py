"""Blocks ranked inside their documents, shared by every selection rule; and a plan from the blocks it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.types import SequenceLayout, TokenPlan


def block_cap(layout: SequenceLayout, keep: float) -> tuple[int, ...]:
    """Most blocks each document may keep under `keep`: its share of the document's blocks, rounded up."""
    # 1e-9 keeps a share such as 0.1 * 30 = 3.0000000000000004 from rounding up to 4.
    return tuple(max(1, -int(-(keep * blocks - 1e-9) // 1)) for blocks in layout.blocks_per_document)


def first_blocks(layout: SequenceLayout, device: torch.device) -> Tensor:
    """Index of each document's first block, int64 [documents]."""
    counts = torch.tensor(layout.blocks_per_document, device=device)
    return counts.cumsum(0) - counts


def order_in_documents(score: Tensor, layout: SequenceLayout, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks sorted by document, then those marked `ahead`, then descending score.

    Args:
        score: [blocks].
        ahead: bool [blocks], blocks that go before all others of their document.

    Returns:
        order: int64 [blocks], block indices; ties keep the order of position.
        rank: int64 [blocks], position of `order`'s blocks inside their document, from 0.
    """
    document = layout.document_of_block
    # Three stable sorts, least significant key first.
    order = score.argsort(descending=True, stable=True)
    order = order[ahead[order].to(torch.int8).argsort(descending=True, stable=True)]
    order = order[document[order].argsort(stable=True)]
    rank = torch.arange(score.numel(), device=score.device) - first_blocks(layout, score.device)[document[order]]
    return order, rank


def plan_from_blocks(kept: Tensor, layout: SequenceLayout, fidelity: float | None = None) -> TokenPlan:
    """The plan that keeps exactly the blocks marked in `kept`, bool [blocks]."""
    rows = (kept[layout.block_of_row.clamp(min=0)] & (layout.block_of_row >= 0)).nonzero().flatten()
    tokens = torch.zeros(len(layout.documents), dtype=torch.int64, device=kept.device)
    tokens.index_add_(0, layout.document_of_block, layout.block_tokens * kept)
    cu_seqlens = (0, *tokens.cumsum(0).tolist())
    return TokenPlan(rows, cu_seqlens, keep=rows.numel() / layout.real_tokens, fidelity=fidelity)
