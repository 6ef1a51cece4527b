"""`forward` mode, the paper's token elimination: a branch runs on its kept tokens only (paper section 4).

Kept rows are read from the residual stream, go through the branch as a compact sequence in their original order and
positions, and are added back; eliminated rows pass along the residual. Attention happens among kept tokens. Ordinary
autograd: gradients are those of the sparse forward that ran (DESIGN 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lemo.config import SparsityConfig
from lemo.selection.ranking import plan_from_blocks
from lemo.selection.scores import (
    attention_informativeness,
    block_pair_scores,
    mlp_informativeness,
    select_by_score,
)
from lemo.sparse.attention import attend_rows
from lemo.sparse.view import LayerView, Rotary
from lemo.types import SequenceLayout, TokenPlan

_ACTIVITY_TILE_BYTES = 256 * 2**20


@dataclass
class ForwardPlans:
    """The two plans of one layer call; kept by the caller so that a checkpointed recomputation reuses them."""

    attention: TokenPlan | None = None
    mlp: TokenPlan | None = None


def run_layer(
    hidden_BTD: Tensor,
    view: LayerView,
    layout: SequenceLayout,
    rotary: Rotary,
    config: SparsityConfig,
    layer: int,
    plans: ForwardPlans,
) -> Tensor:
    """The layer's output [B, T, D] with blocks left out of attention and MLP.

    Args:
        hidden_BTD: the layer's input.
        view, layout, rotary: the layer, the documents, and (cos, sin) for all B·T rows.
        config: scores and selection of each branch.
        layer: index of the layer, for per-layer thresholds.
        plans: filled on the first run, obeyed on the next.
    """
    hidden = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if plans.attention is None:
        plans.attention = _plan_attention(hidden.detach(), view, layout, rotary, config, layer)
    hidden = hidden.index_add(0, plans.attention.rows, _attention(hidden, view, layout, rotary, plans.attention))
    if view.post_norm:
        hidden = view.attention_norm(hidden)
    if plans.mlp is None:
        plans.mlp = _plan_mlp(hidden.detach(), view, layout, config, layer)
    kept = hidden[plans.mlp.rows]
    branch = view.mlp(kept if view.post_norm else view.mlp_norm(kept))
    hidden = hidden.index_add(0, plans.mlp.rows, branch.to(hidden.dtype))
    if view.post_norm:
        hidden = view.mlp_norm(hidden)
    return hidden.view_as(hidden_BTD)


def _attention(hidden: Tensor, view: LayerView, layout: SequenceLayout, rotary: Rotary, plan: TokenPlan) -> Tensor:
    kept = hidden[plan.rows]
    normed = kept if view.post_norm else view.attention_norm(kept)
    kept_rotary = None if rotary is None else (rotary[0][plan.rows], rotary[1][plan.rows])
    q = view.query(normed, kept_rotary)
    k, v = view.key_value(normed, kept_rotary)
    context = attend_rows(view, q, k, v, plan.rows, plan.cu_seqlens, plan.rows, plan.cu_seqlens, layout, dropout=None)
    return view.attention_output(context).to(hidden.dtype)


@torch.no_grad()
def _plan_attention(
    hidden: Tensor,
    view: LayerView,
    layout: SequenceLayout,
    rotary: Rotary,
    config: SparsityConfig,
    layer: int,
) -> TokenPlan:
    selection = config.attention_selection
    if selection is None:
        return _everything(layout, hidden.device)
    with NoDropout():
        normed = hidden if view.post_norm else view.attention_norm(hidden)
        q = view.query(normed, rotary)
        k, _ = view.key_value(normed, rotary)
        scores = [
            attention_informativeness(
                block_pair_scores(q[:, a:b], k[:, a:b], view.scaling, layout.block_size, view.window),
                causal=config.score == "causal",
            )
            for a, b in layout.documents
        ]
    return select_by_score(torch.cat(scores), layout, selection, layer)


@torch.no_grad()
def _plan_mlp(hidden: Tensor, view: LayerView, layout: SequenceLayout, config: SparsityConfig, layer: int) -> TokenPlan:
    selection = config.mlp_selection
    if selection is None:
        return _everything(layout, hidden.device)
    step = max(1, _ACTIVITY_TILE_BYTES // max(1, view.mlp_row_bytes))
    with NoDropout():
        activity = torch.cat(
            [view.mlp_activity(part if view.post_norm else view.mlp_norm(part)) for part in hidden.split(step)]
        )
    return select_by_score(mlp_informativeness(activity, layout, config.score == "causal"), layout, selection, layer)


def _everything(layout: SequenceLayout, device: torch.device) -> TokenPlan:
    return plan_from_blocks(torch.ones(layout.block_tokens.numel(), dtype=torch.bool, device=device), layout)


class NoDropout(TorchFunctionMode):
    """Scores are judged without dropout, and without drawing from the random stream the branch will use."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.dropout:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
