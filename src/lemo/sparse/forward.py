"""`forward` mode, the paper's token elimination: a branch runs on its kept tokens only (paper section 4).

Kept rows are read from the residual stream, go through the branch as a compact sequence in their original order and
positions, and are added back; eliminated rows pass along the residual, with the output of a low-rank bypass where one
is fitted. Attention happens among kept tokens. Ordinary autograd: gradients are those of the sparse forward that ran
(DESIGN 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lemo.config import BranchSelection, SparsityConfig
from lemo.selection.layout import rows_left_out
from lemo.selection.predictor import Predictor, predicted_scores
from lemo.selection.ranking import plan_of_everything
from lemo.selection.scores import (
    attention_informativeness,
    block_pair_scores,
    keeps_everything,
    mlp_informativeness,
    select_by_score,
)
from lemo.sparse.attention import attend_rows
from lemo.sparse.bypass import Bypass
from lemo.sparse.dropout import RowDropout, on_rows
from lemo.sparse.view import LayerView, Rotary
from lemo.types import NormWeights, SequenceLayout, TokenPlan

_ACTIVITY_TILE_BYTES = 256 * 2**20


@dataclass
class ForwardPlans:
    """What one layer call decided; kept by the caller so that a checkpointed recomputation decides the same.

    Attributes:
        seed: of the dropout masks, None without dropout.
        attention, mlp: the branches' plans, None until the first run.
    """

    seed: int | None
    attention: TokenPlan | None = None
    mlp: TokenPlan | None = None


@dataclass(frozen=True)
class ForwardCall:
    """One call of one layer.

    Attributes:
        view: the layer.
        layout: documents and blocks of the batch.
        rotary: (cos, sin) for all B·T rows, or None.
        config: scores and selection of each branch.
        layer: index of the layer, for per-layer thresholds.
        attend: normed hidden states [B, T, D] -> the unmodified attention module's output.
        attention_bypass, mlp_bypass: what eliminated rows get in the branch's place; None for nothing.
        attention_predictor, mlp_predictor: give the scores in place of exact ones; None computes them.
    """

    view: LayerView
    layout: SequenceLayout
    rotary: Rotary
    config: SparsityConfig
    layer: int
    attend: Callable[[Tensor], Tensor]
    attention_bypass: Bypass | None = None
    mlp_bypass: Bypass | None = None
    attention_predictor: Predictor | None = None
    mlp_predictor: Predictor | None = None


def run_layer(hidden_BTD: Tensor, call: ForwardCall, plans: ForwardPlans) -> Tensor:
    """The layer's output [B, T, D] with blocks left out of attention and MLP.

    Args:
        hidden_BTD: the layer's input.
        call: the layer and the batch.
        plans: filled on the first run, obeyed on the next.
    """
    if plans.seed is None:
        return _run_layer(hidden_BTD, call, plans, None)
    with RowDropout(plans.seed) as dropout:
        return _run_layer(hidden_BTD, call, plans, dropout)


def _run_layer(hidden_BTD: Tensor, call: ForwardCall, plans: ForwardPlans, dropout: RowDropout | None) -> Tensor:
    view = call.view
    if plans.attention is None:
        plans.attention = _plan_attention(hidden_BTD.detach(), call)
    if plans.attention.keep == 1.0:
        hidden_BTD = hidden_BTD + call.attend(hidden_BTD if view.post_norm else view.attention_norm(hidden_BTD))
    else:
        branch = _attention(hidden_BTD.flatten(0, 1), call, plans.attention, dropout)
        hidden_BTD = _add(hidden_BTD, plans.attention, branch, call, call.attention_bypass, view.attention_norm)
    if view.post_norm:
        hidden_BTD = view.attention_norm(hidden_BTD)
    if plans.mlp is None:
        plans.mlp = _plan_mlp(hidden_BTD.detach(), call)
    everything = plans.mlp.keep == 1.0
    kept = hidden_BTD if everything else hidden_BTD.flatten(0, 1)[plans.mlp.rows]
    with on_rows(dropout, None if everything else plans.mlp.rows):
        branch = view.mlp(kept if view.post_norm else view.mlp_norm(kept))
    if everything:
        hidden_BTD = hidden_BTD + branch
    else:
        hidden_BTD = _add(hidden_BTD, plans.mlp, branch, call, call.mlp_bypass, view.mlp_norm)
    if view.post_norm:
        hidden_BTD = view.mlp_norm(hidden_BTD)
    return hidden_BTD


def _add(
    hidden_BTD: Tensor,
    plan: TokenPlan,
    branch_ND: Tensor,
    call: ForwardCall,
    bypass: Bypass | None,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The residual stream with a branch's output added at the kept rows, the bypass's at the others."""
    hidden = hidden_BTD.flatten(0, 1)
    out = hidden.index_add(0, plan.rows, branch_ND.to(hidden.dtype))
    if bypass is not None:
        left = rows_left_out(plan, call.layout)
        rows = hidden[left]
        instead = bypass(rows if call.view.post_norm else norm(rows))
        out = out.index_add(0, left, instead.to(out.dtype))
    return out.view_as(hidden_BTD)


def _attention(hidden: Tensor, call: ForwardCall, plan: TokenPlan, dropout: RowDropout | None) -> Tensor:
    view, rotary, rows = call.view, call.rotary, plan.rows
    kept = hidden[rows]
    normed = kept if view.post_norm else view.attention_norm(kept)
    kept_rotary = None if rotary is None else (rotary[0][rows], rotary[1][rows])
    with on_rows(dropout, rows):
        q = view.query(normed, kept_rotary)
        k, v = view.key_value(normed, kept_rotary)
        context = attend_rows(view, q, k, v, plan, plan, call.layout, dropout)
        return view.attention_output(context)


@torch.no_grad()
def _plan_attention(hidden_BTD: Tensor, call: ForwardCall) -> TokenPlan:
    view, layout = call.view, call.layout
    selection = call.config.attention_selection
    if selection is None or keeps_everything(selection, call.layer):
        return plan_of_everything(layout)
    with NoDropout():
        hidden = hidden_BTD.flatten(0, 1)
        if call.attention_predictor is not None:
            norm, weights = view.attention_norm, view.attention_norm_weights
            return _predicted(call.attention_predictor, hidden, norm, weights, call, selection)
        normed = hidden if view.post_norm else view.attention_norm(hidden)
        q = view.query(normed, call.rotary)
        k, _ = view.key_value(normed, call.rotary)
        scores = [
            attention_informativeness(
                block_pair_scores(
                    q[:, a:b], k[:, a:b], view.scaling, layout.block_size, view.window, call.config.score == "mass"
                ),
                causal=call.config.score == "causal",
            )
            for a, b in layout.documents
        ]
    return select_by_score(torch.cat(scores), layout, selection, call.layer)


@torch.no_grad()
def _plan_mlp(hidden_BTD: Tensor, call: ForwardCall) -> TokenPlan:
    view, layout = call.view, call.layout
    selection = call.config.mlp_selection
    if selection is None or keeps_everything(selection, call.layer):
        return plan_of_everything(layout)
    if call.mlp_predictor is not None:
        hidden = hidden_BTD.flatten(0, 1)
        return _predicted(call.mlp_predictor, hidden, view.mlp_norm, view.mlp_norm_weights, call, selection)
    step = max(1, _ACTIVITY_TILE_BYTES // max(1, view.mlp_row_bytes))
    with NoDropout():
        activity = torch.cat(
            [
                view.mlp_activity(part if view.post_norm else view.mlp_norm(part))
                for part in hidden_BTD.flatten(0, 1).split(step)
            ]
        )
    score = mlp_informativeness(activity, layout, call.config.score == "causal")
    return select_by_score(score, layout, selection, call.layer)


def _predicted(
    predictor: Predictor,
    hidden_ND: Tensor,
    norm: Callable[[Tensor], Tensor],
    weights: NormWeights | None,
    call: ForwardCall,
    selection: BranchSelection,
) -> TokenPlan:
    if call.view.post_norm:
        norm, weights = (lambda hidden: hidden), None
    score = predicted_scores(predictor, hidden_ND, norm, weights, call.layout, call.config.score == "causal")
    return select_by_score(score, call.layout, selection, call.layer)


class NoDropout(TorchFunctionMode):
    """Scores are judged without dropout, and without drawing from the random stream the branch will use."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.dropout:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
