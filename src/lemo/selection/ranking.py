"""Blocks ranked inside their documents, shared by every selection rule; and a plan from the blocks it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.types import SequenceLayout, TokenPlan


def block_cap(layout: SequenceLayout, keep: float) -> tuple[int, ...]:
    """Most blocks each document may keep under `keep`: its share of the document's blocks, rounded up."""
    # 1e-9 keeps a share such as 0.1 * 30 = 3.0000000000000004 from rounding up to 4.
    return tuple(max(1, -int(-(keep * blocks - 1e-9) // 1)) for blocks in layout.blocks_per_document)


def most_blocks(layout: SequenceLayout, keep: float) -> Tensor:
    """`block_cap` without a transfer, fp64 [documents] on the layout's device."""
    blocks = torch.diff(layout.first_block, append=layout.first_block.new_full((1,), layout.block_tokens.numel()))
    return torch.ceil(keep * blocks.double() - 1e-9).clamp(min=1)


def order_in_documents(score: Tensor, layout: SequenceLayout, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks sorted by document, then descending `ahead`, then descending score.

    Args:
        score: [blocks].
        ahead: bool or int [blocks], blocks with more go before all others of their document.

    Returns:
        order: int64 [blocks], block indices; ties keep the order of position.
        rank: int64 [blocks], position of `order`'s blocks inside their document, from 0.
    """
    document = layout.document_of_block
    # Three stable sorts, least significant key first.
    order = score.argsort(descending=True, stable=True)
    order = order[ahead[order].to(torch.int8).argsort(descending=True, stable=True)]
    order = order[document[order].argsort(stable=True)]
    rank = torch.arange(score.numel(), device=score.device) - layout.first_block[document[order]]
    return order, rank


def plan_from_blocks(kept: Tensor, layout: SequenceLayout, fidelity: float | None = None) -> TokenPlan:
    """The plan that keeps exactly the blocks marked in `kept`, bool [blocks], on any device.

    From the CPU nothing waits for the device; otherwise there is one transfer.
    """
    host = layout.on_host
    blocks = kept.cpu().nonzero().flatten()
    tokens = host.block_tokens[blocks]
    total = int(tokens.sum())
    counts = torch.zeros(len(layout.documents), dtype=torch.int64)
    counts.index_add_(0, host.document_of_block[blocks], tokens)
    host_rows = _rows(blocks, host, total)
    # Small and from pageable memory: staged at once, so nothing waits.
    rows = _rows(blocks.to(layout.block_tokens.device, non_blocking=True), layout, total) if layout.host else host_rows
    cu_seqlens = (0, *counts.cumsum(0).tolist())
    return TokenPlan(rows, host_rows, cu_seqlens, keep=total / layout.real_tokens, fidelity=fidelity)


def _rows(blocks: Tensor, layout: SequenceLayout, total: int) -> Tensor:
    """The rows of some blocks, ascending; `total` of them."""
    tokens = layout.block_tokens[blocks]
    # Row = first row of its block + place in the block.
    offset = layout.first_row_of_block[blocks] - (tokens.cumsum(0) - tokens)
    return torch.repeat_interleave(offset, tokens, output_size=total) + torch.arange(total, device=blocks.device)
