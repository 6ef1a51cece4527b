"""Block selection by gradient energy: the smallest set of blocks that reaches a fidelity (DESIGN 3, 4.2, 4.6).

Everything here is per document and vectorised over the documents of a batch; B·T rows, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.selection.ranking import block_cap, most_blocks, order_in_documents, plan_from_blocks
from lemo.types import SequenceLayout, TokenPlan


def row_norms(grad_BTD: Tensor) -> Tensor:
    """Norm of each row's gradient, in fp32 or wider, [B·T], without a full-width temporary."""
    wide = torch.float64 if grad_BTD.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(grad_BTD.flatten(0, 1), dim=-1, dtype=wide)


def block_energy(grad_BTD: Tensor, layout: SequenceLayout) -> Tensor:
    """Squared gradient norm of each block, in fp32 or wider, [blocks]. Padding counts for none.

    One pass over the gradient; no full-width temporary.
    """
    norms = row_norms(grad_BTD).double()
    # One extra slot takes the padding's rows.
    slots = torch.where(layout.block_of_row < 0, layout.block_tokens.numel(), layout.block_of_row)
    energy = norms.new_zeros(layout.block_tokens.numel() + 1)
    return energy.index_add_(0, slots, norms.square())[:-1]


def select_by_energy(
    energy: Tensor,
    layout: SequenceLayout,
    fidelity: float,
    keep: float | None,
    labelled: Tensor | None,
    priority: Tensor | None = None,
    sink: bool = False,
) -> TokenPlan:
    """The plan of one layer: labelled blocks and the sink, then blocks by energy until `fidelity` is reached.

    Args:
        energy: [blocks], from `block_energy`.
        fidelity: share to reach of the energy of each document's blocks that compete (those that aren't kept anyway),
            in [0, 1]; 1 keeps every nonzero block, 0 none. So the share of all the energy is at least as high, which
            is the plan's fidelity.
        keep: cap on the share of each document's blocks, or None.
        labelled: bool [blocks], blocks that are kept first; None lets every block compete.
        priority: [blocks], what blocks are ordered by in energy's place, up to `keep`; `fidelity` is then ignored, and
            blocks without energy are kept too.
        sink: keep each document's first block too, wherever it has a gradient and the cap leaves another one: where an
            MLP writes an attention sink's massive activation, most of the gradient of its weights comes from that
            row, however faint the gradient at the layer's output is there (docs/decisions/0006).

    Raises:
        ValueError: labelled blocks alone exceed `keep`.
    """
    documents = len(layout.documents)
    document = layout.document_of_block
    if labelled is None:
        labelled = torch.zeros_like(energy, dtype=torch.bool)

    cap = None if keep is None else most_blocks(layout, keep)
    ahead = 2 * labelled.to(torch.int8)
    if sink:
        takes_part = energy[layout.first_block] > 0
        if cap is not None:
            takes_part &= cap > 1
        ahead[layout.first_block] += takes_part
    total = energy.new_zeros(documents).index_add_(0, document, energy)
    compete = torch.where(ahead == 0, energy, 0.0)
    competing = energy.new_zeros(documents).index_add_(0, document, compete)
    # As shares of the document's, so that a faint document isn't lost in the running sum of a loud one.
    measured = (competing > 0) & competing.isfinite()
    share = torch.where(measured[document], compete / competing[document], 0.0)

    order, rank = order_in_documents(energy if priority is None else priority, layout, ahead)
    sorted_document, sorted_share = document[order], share[order]
    before = sorted_share.cumsum(0) - sorted_share
    before = before - before[layout.first_block][sorted_document]

    # A nonzero block counts at fidelity 1 even where it is too small to move the running sum.
    wanted = energy[order] > 0 if priority is None else torch.ones_like(labelled)
    if fidelity < 1.0 and priority is None:
        wanted &= before < fidelity
    wanted |= ahead[order] > 0
    # Inf and NaN must travel to the optimizer's (or the grad scaler's) check as in the dense model.
    wanted |= ~total.isfinite()[sorted_document]
    if cap is not None:
        wanted &= rank < cap[sorted_document]

    kept = torch.zeros_like(labelled)
    kept[order] = wanted
    held = energy.new_zeros(documents).index_add_(0, document, energy * kept)
    reached = torch.where((total > 0) & total.isfinite(), held / total, 1.0).mean().double()
    # All that the host must know, in one transfer.
    facts = torch.cat([kept.view(torch.uint8), labelled.view(torch.uint8), reached[None].view(torch.uint8)]).cpu()
    kept, labelled = facts[:-8].view(torch.bool).chunk(2)
    if keep is not None:
        _refuse_labels_over_cap(labelled, layout, keep)
    return plan_from_blocks(kept, layout, fidelity=float(facts[-8:].clone().view(torch.float64)))


def _refuse_labels_over_cap(labelled: Tensor, layout: SequenceLayout, keep: float) -> None:
    cap = torch.tensor(block_cap(layout, keep))
    counts = torch.zeros_like(cap).index_add_(0, layout.on_host.document_of_block, labelled.to(cap.dtype))
    over = (counts > cap).nonzero().flatten()
    if over.numel():
        worst = int(over[0])
        raise ValueError(
            f"labelled blocks alone exceed keep={keep:g}: document {worst} of the batch has {int(counts[worst])} "
            f"labelled blocks and may keep {int(cap[worst])}. Raise keep, set labelled='ranked' to let labelled blocks "
            "compete, or, where every token is labelled, use policy='segments'"
        )
