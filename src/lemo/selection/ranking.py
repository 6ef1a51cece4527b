"""Blocks ranked inside their documents, shared by every selection rule; and a plan from the blocks it keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
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
    # NumPy: torch would wake a pool of threads for each of these small operations.
    blocks = np.flatnonzero(kept.cpu().numpy())
    tokens = host.block_tokens.numpy()[blocks]
    ends = tokens.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    # Row = first row of its block + place in the block.
    offset = host.first_row_of_block.numpy()[blocks] - (ends - tokens)
    host_rows = torch.from_numpy(np.repeat(offset, tokens) + np.arange(total))
    # Kept blocks of the documents before each, then their tokens.
    before = np.searchsorted(blocks, np.append(host.first_block.numpy(), len(host.block_tokens)))
    cu_seqlens = tuple(np.append(0, ends)[before].tolist())
    # Staged at once from pageable memory, so nothing waits.
    rows = host_rows.to(layout.block_tokens.device, non_blocking=True)
    return TokenPlan(rows, cu_seqlens, total / layout.real_tokens, fidelity, known_rows=host_rows)


def plan_of_marked(kept: Tensor, layout: SequenceLayout) -> TokenPlan:
    """The same of blocks marked on the device: its rows are made there, and only documents' lengths come from it.

    So little is left to do once they are known that the device hardly waits for the host.
    """
    made, last = layout.made, len(kept) - 1
    if "all_places" not in made:
        made["all_places"] = torch.arange(layout.real_tokens, device=kept.device)
        made["last_blocks"] = torch.cat([layout.first_block[1:] - 1, layout.first_block.new_full((1,), last)])
    places: Tensor = made["all_places"]
    tokens = torch.where(kept, layout.block_tokens, 0)
    ends = tokens.cumsum(0)
    # The block of each place among the kept rows; places after the last row are cut off.
    block = torch.searchsorted(ends, places, right=True).clamp_(max=last)
    rows = (layout.first_row_of_block + tokens - ends)[block] + places
    lengths = ends[made["last_blocks"]].tolist()
    if lengths[-1] == layout.real_tokens:
        return plan_of_everything(layout)
    return TokenPlan(rows[: lengths[-1]].clone(), (0, *lengths), lengths[-1] / layout.real_tokens)


def plan_of_everything(layout: SequenceLayout, fidelity: float | None = None) -> TokenPlan:
    """The plan that keeps all blocks; made once for a layout."""
    if "everything" not in layout.made:
        everything = torch.ones(layout.block_tokens.numel(), dtype=torch.bool)
        layout.made["everything"] = plan_from_blocks(everything, layout)
    return replace(layout.made["everything"], fidelity=fidelity)
