"""Blocks spread evenly: a placement for measurements, where what is kept must not depend on random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.selection.ranking import block_cap
from lemo.types import SequenceLayout


def spread_blocks(layout: SequenceLayout, labelled: Tensor, keep: float) -> Tensor:
    """The labelled blocks and, up to the share `keep` of each document's blocks, others at equal distances.

    Args:
        layout: documents and blocks.
        labelled: bool [blocks].
        keep: share of the blocks, in (0, 1].

    Returns:
        bool [blocks], on the layout's device.
    """
    host = layout.on_host
    kept = labelled.cpu().clone()
    for document, most in enumerate(block_cap(layout, keep)):
        free = (~kept & (host.document_of_block == document)).nonzero().flatten()
        count = max(0, most - int(kept[host.document_of_block == document].sum()))
        kept[free[torch.arange(count) * len(free) // max(1, count)]] = True
    return kept.to(labelled.device)
