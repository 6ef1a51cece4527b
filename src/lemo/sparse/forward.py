"""`forward` mode, the paper's token elimination: a branch runs on its kept tokens only (paper section 4).

Kept rows are read from the residual stream at their place, go through the branch as a compact sequence in their
original order and positions, and are added back in place (`lemo.sparse.movement`); eliminated rows pass along the
residual, with the output of a low-rank bypass where one is fitted. Attention happens among kept tokens. Gradients are
those of the sparse forward that ran (DESIGN 4.2). A branch neither makes nor stores anything of T rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lemo.config import SparsityConfig
from lemo.kernels.dispatch import movement_backend
from lemo.selection.layout import rows_left_out
from lemo.selection.predictor import ActivityPredictor, predicted_scores
from lemo.selection.ranking import plan_of_everything
from lemo.selection.score_heads import ScoreHeads
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
from lemo.sparse.movement import add_rows, norm_again, own_gradient, own_stream, read_normed, read_rows
from lemo.sparse.parts import part
from lemo.sparse.recompute import recomputed
from lemo.sparse.view import Branch, LayerView, Rotary
from lemo.types import SequenceLayout, TokenPlan

_ACTIVITY_TILE_BYTES = 256 * 2**20
Again = Callable[[], Tensor] | None


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
        attend_kept: (queries [H, N, d], keys and values [K, N, d] of the plan's rows, scale, plan) -> [N, H, d], where
            kept tokens see some of the kept tokens; None: all of them.
        attention_predictor, mlp_predictor: give the scores in place of exact ones; None computes them.
        checkpointed: whether nothing of the layer but its input will be stored.
    """

    view: LayerView
    layout: SequenceLayout
    rotary: Rotary
    config: SparsityConfig
    layer: int
    attend: Callable[[Tensor], Tensor]
    attention_bypass: Bypass | None = None
    mlp_bypass: Bypass | None = None
    attention_predictor: ScoreHeads | None = None
    mlp_predictor: ActivityPredictor | None = None
    checkpointed: bool = False
    attend_kept: Callable[[Tensor, Tensor, Tensor, float, TokenPlan], Tensor] | None = None


def run_layer(hidden_BTD: Tensor, call: ForwardCall, plans: ForwardPlans) -> Tensor:
    """The layer's output [B, T, D] with blocks left out of attention and MLP.

    Args:
        hidden_BTD: the layer's input.
        call: the layer and the batch.
        plans: filled on the first run, obeyed on the next.
    """
    with call.view.fused(store_less=not call.checkpointed):
        if plans.seed is None:
            return _run_layer(hidden_BTD, call, plans, None)
        with RowDropout(plans.seed) as dropout:
            return _run_layer(hidden_BTD, call, plans, dropout)


def _run_layer(hidden_BTD: Tensor, call: ForwardCall, plans: ForwardPlans, dropout: RowDropout | None) -> Tensor:
    view = call.view
    if plans.attention is None:
        with part("selection"):
            plans.attention = _plan_attention(hidden_BTD.detach(), call)
    everything = plans.attention.keep == 1.0 and call.attend_kept is None
    if everything:
        normed = hidden_BTD if view.post_norm else view.attention_norm(hidden_BTD)
        stream = (hidden_BTD + call.attend(normed)).contiguous()
    else:
        attend = functools.partial(_attend, call=call, plan=plans.attention, dropout=dropout)
        stream = _branch(own_stream(hidden_BTD), "attention", attend, plans.attention, call, call.attention_bypass)
    if view.post_norm:
        stream = view.attention_norm(stream if everything else own_gradient(stream))
    if plans.mlp is None:
        with part("selection"):
            plans.mlp = _plan_mlp(stream.detach(), call)
    if plans.mlp.keep == 1.0:
        # What comes back along the stream is summed with what the norm passes back: nobody else's gradient.
        with on_rows(dropout, None):
            stream = stream + view.mlp(stream if view.post_norm else view.mlp_norm(stream))
    else:

        def feed(normed_ND: Tensor, again: Again, rows: Tensor = plans.mlp.rows) -> Tensor:
            with on_rows(dropout, rows), recomputed(normed_ND, again):
                return view.mlp(normed_ND)

        # A norm on the residual path is a module, whose output others may hold.
        stream = own_stream(stream) if view.post_norm else stream
        stream = _branch(stream, "mlp", feed, plans.mlp, call, call.mlp_bypass, last=True)
    return view.mlp_norm(stream) if view.post_norm else stream


def _branch(
    stream_BTD: Tensor,
    name: Branch,
    run: Callable[[Tensor, Again], Tensor],
    plan: TokenPlan,
    call: ForwardCall,
    bypass: Bypass | None,
    last: bool = False,
) -> Tensor:
    """The stream with a branch's output added at the kept rows, the bypass's at the others; all of it in place.

    Args:
        stream_BTD: owned (`lemo.sparse.movement`).
        run: the branch, from its normalised input to its output, [kept, D] both; and what computes its input again.
        last: whether the stream's gradient comes from outside.
    """
    stream_BTD, normed_ND, again = _read(stream_BTD, plan.rows, name, call)
    stream_BTD = add_rows(stream_BTD, plan.rows, run(normed_ND, again), last=last and bypass is None)
    if bypass is not None:
        left = rows_left_out(plan, call.layout)
        stream_BTD, normed_ND, _ = _read(stream_BTD, left, name, call)
        stream_BTD = add_rows(stream_BTD, left, bypass(normed_ND), last=last)
    return stream_BTD


def _read(stream_BTD: Tensor, rows: Tensor, name: Branch, call: ForwardCall) -> tuple[Tensor, Tensor, Again]:
    """The same stream, and a branch's input at some rows, [N, D]: in one pass where the norm is known to the kernel.

    Then the third says how to compute it again from what is stored anyway.
    """
    view = call.view
    norm = view.attention_norm_weights if name == "attention" else view.mlp_norm_weights
    if not view.post_norm and norm is not None and movement_backend(stream_BTD, norm.weight) == "triton":
        stream_BTD, normed_ND, kept_ND = read_normed(stream_BTD, rows, norm)
        if kept_ND is None or call.checkpointed:
            return stream_BTD, normed_ND, None
        return stream_BTD, normed_ND, functools.partial(norm_again, kept_ND, norm, normed_ND.dtype)
    stream_BTD, rows_ND = read_rows(stream_BTD, rows)
    if not view.post_norm:
        rows_ND = view.attention_norm(rows_ND) if name == "attention" else view.mlp_norm(rows_ND)
    return stream_BTD, rows_ND, None


def _attend(normed_ND: Tensor, again: Again, call: ForwardCall, plan: TokenPlan, dropout: RowDropout | None) -> Tensor:
    """The attention branch of the kept rows among themselves, [kept, D]."""
    view, rows = call.view, plan.rows
    with on_rows(dropout, rows):
        with recomputed(normed_ND, again):
            q, k, v = view.query_key_value(normed_ND, call.rotary, rows)
        if call.attend_kept is None:
            context = attend_rows(view, q, k, v, plan, plan, call.layout, dropout)
        else:
            context = call.attend_kept(q, k, v, view.scaling, plan).reshape(len(rows), -1)
        return view.attention_output(context)


@torch.no_grad()
def _plan_attention(hidden_BTD: Tensor, call: ForwardCall) -> TokenPlan:
    view, layout = call.view, call.layout
    selection = call.config.attention_selection
    if selection is None or keeps_everything(selection, call.layer):
        return plan_of_everything(layout)
    hidden = hidden_BTD.flatten(0, 1)
    if call.attention_predictor is not None:
        score = _score_by_heads(call.attention_predictor, hidden, call)
        return select_by_score(score, layout, selection, call.layer)
    with NoDropout():
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
        norm, weights = (None, None) if view.post_norm else (view.mlp_norm, view.mlp_norm_weights)
        hidden = hidden_BTD.flatten(0, 1).contiguous()
        score = predicted_scores(call.mlp_predictor, hidden, norm, weights, layout, call.config.score == "causal")
        return select_by_score(score, layout, selection, call.layer)
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


def _score_by_heads(heads: ScoreHeads, hidden_ND: Tensor, call: ForwardCall) -> Tensor:
    view, kind = call.view, call.config.score
    norm, weights = (None, None) if view.post_norm else (view.attention_norm, view.attention_norm_weights)
    rotate = functools.partial(view.rotate, rotary=call.rotary)
    return heads.scores(
        hidden_ND.contiguous(), norm, weights, rotate, call.layout, view.window,
        causal=kind == "causal", mass=kind == "mass",
    )  # fmt: skip


class NoDropout(TorchFunctionMode):
    """Scores are judged without dropout, and without drawing from the random stream the branch will use."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.dropout:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
