"""Where documents and blocks lie in a batch, from what a caller of the model passes.

transformers' own rules are followed, so that the unmodified model and lemo see the same documents: a 2-D
`attention_mask` marks padding; without one, `position_ids` that don't ascend by one start a new document.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lemo.types import SequenceLayout, TokenPlan


def build_layout(
    batch: int,
    length: int,
    block_size: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """Finds documents and cuts them into blocks, counted from each document's first real token.

    Args:
        batch, length: B and T.
        block_size: tokens per block.
        device: of the layout's tensors.
        attention_mask: [B, T], nonzero at real tokens; left or right padding, no gaps.
        position_ids: [B or 1, T], restarting where a new packed document starts; used without a mask only.

    Raises:
        ValueError: the mask isn't [B, T], has gaps, or marks no token.
    """
    if attention_mask is not None:
        documents = _documents_from_mask(attention_mask, batch, length)
    elif position_ids is not None:
        documents = _documents_from_positions(position_ids, batch, length)
    else:
        documents = tuple((b * length, (b + 1) * length) for b in range(batch))
    if not documents:
        raise ValueError("attention_mask marks no real token in the whole batch; drop empty batches")

    first_rows = [torch.arange(first, end, block_size) for first, end in documents]
    blocks = torch.tensor([len(rows) for rows in first_rows])
    ends = torch.tensor([end for _, end in documents])
    document_of_block = torch.repeat_interleave(torch.arange(len(documents)), blocks)
    first_row_of_block = torch.cat(first_rows)
    block_tokens = (ends[document_of_block] - first_row_of_block).clamp(max=block_size)
    block_of_row = torch.full((batch * length,), -1, dtype=torch.int64)
    real = torch.cat([torch.arange(first, end) for first, end in documents])
    block_of_row[real] = torch.repeat_interleave(torch.arange(len(block_tokens)), block_tokens)
    edge_block = torch.zeros(len(block_tokens), dtype=torch.bool)
    edge_block[blocks.cumsum(0) - blocks] = True
    edge_block[blocks.cumsum(0) - 1] = True
    host = SequenceLayout(
        shape=(batch, length),
        documents=documents,
        block_of_row=block_of_row,
        document_of_block=document_of_block,
        block_tokens=block_tokens,
        first_row_of_block=first_row_of_block,
        first_block=blocks.cumsum(0) - blocks,
        edge_block=edge_block,
        block_size=block_size,
    )
    if device.type == "cpu":
        return host
    tensors = ("block_of_row", "document_of_block", "block_tokens", "first_row_of_block", "first_block", "edge_block")
    return replace(host, host=host, **{name: getattr(host, name).to(device, non_blocking=True) for name in tensors})


def causal_bounds(layout: SequenceLayout, rows: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """First and last row that each of some rows sees as a key, int64 each; a row of padding sees itself.

    Args:
        rows: int64, ascending.
        window: sliding window in tokens, or None.
    """
    block = layout.block_of_row[rows]
    document = layout.document_of_block[block.clamp(min=0)]
    first = torch.where(block < 0, rows, layout.first_row_of_block[layout.first_block[document]])
    return first if window is None else torch.maximum(first, rows - window + 1), rows


def refuse_padding(layout: SequenceLayout, rows: Tensor) -> None:
    """Raises ValueError if padding is among the rows, bool [B·T], that enter the loss."""
    padding = layout.block_of_row < 0
    if layout.real_tokens < layout.rows and bool((rows.to(padding.device) & padding).any()):
        raise ValueError(
            "padding predicts a label (on the left, that of a sequence's first token), but lemo leaves padding out, so "
            "its gradient would be lost; set it to -100, and padding's own labels too, or pad on the right"
        )


def table_of_documents(layout: SequenceLayout) -> Tensor:
    """Each document's first block, blocks, first row and the row after its last, int64 [documents, 4]; made once."""
    if "documents" not in layout.made:
        rows = zip(
            layout.on_host.first_block.tolist(), layout.blocks_per_document, *zip(*layout.documents, strict=True),
            strict=True,
        )  # fmt: skip
        layout.made["documents"] = torch.tensor(list(rows)).to(layout.block_tokens.device, non_blocking=True)
    return layout.made["documents"]


def rows_left_out(plan: TokenPlan, layout: SequenceLayout) -> Tensor:
    """The documents' rows that a plan doesn't keep, int64, ascending; where their number is known nothing waits."""
    if plan.known_rows is not None:
        left = layout.on_host.block_of_row.numpy() >= 0
        left[plan.known_rows.numpy()] = False
        return torch.from_numpy(np.flatnonzero(left)).to(plan.rows.device, non_blocking=True)
    taken = (layout.block_of_row < 0).index_fill_(0, plan.rows, True)
    return taken.to(torch.uint8).argsort(stable=True)[: layout.real_tokens - len(plan.rows)]


def _documents_from_mask(mask: Tensor, batch: int, length: int) -> tuple[tuple[int, int], ...]:
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"lemo needs a 2-D attention_mask of shape {(batch, length)} (1 at real tokens, 0 at padding), got shape "
            f"{tuple(mask.shape)}; pass packed documents by position_ids that restart, without an attention_mask"
        )
    documents = []
    for b, real in enumerate((mask != 0).cpu()):
        where = real.nonzero().flatten()
        if not len(where):
            continue
        first, end = int(where[0]), int(where[-1]) + 1
        if end - first != len(where):
            raise ValueError(
                f"attention_mask of sequence {b} has gaps; padding must be on the left or on the right (with "
                "PEFT's prompt tuning on the right, since its tokens come first)"
            )
        documents.append((b * length + first, b * length + end))
    return tuple(documents)


def _documents_from_positions(position_ids: Tensor, batch: int, length: int) -> tuple[tuple[int, int], ...]:
    positions = position_ids.expand(batch, length).cpu()
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=-1) != 1
    firsts = starts.flatten().nonzero().flatten().tolist()
    return tuple(zip(firsts, [*firsts[1:], batch * length], strict=True))
