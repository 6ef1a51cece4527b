"""`backward` mode: a dense forward that stores only its input, and a backward over the kept blocks (DESIGN 4.2).

Forward: the unmodified layer under no-grad; with a tile budget the MLP goes in row tiles, so that no full-width
intermediate exists. Backward: from the gradient at the layer's output choose the kept rows, recompute these rows'
part of the layer with autograd, and back-propagate it. Rows that aren't kept pass their gradient along the residual
stream, and receive gradients through keys and values (`kv_grad: all`).

Parameters are inputs of the Function and their gradients its return values, so DDP/FSDP hooks, accumulation and
clipping see ordinary gradients (DESIGN 4.9). Rejected: layer-wise torch checkpointing with gradient masks, which is
exact too but recomputes every row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lemo.sparse.attention import attend_rows
from lemo.sparse.compensation import Compensation
from lemo.sparse.dropout import RowDropout, on_rows
from lemo.sparse.parts import part
from lemo.sparse.view import LayerView, Rotary
from lemo.types import SequenceLayout, TokenPlan

_WHOLE = 256


@dataclass
class BackwardCall:
    """One call of one layer.

    Attributes:
        view: the layer.
        layout: documents and blocks of the batch.
        choose: gradient at the layer's output [B, T, D] -> plan.
        dense: hidden states [B, T, D] -> the unmodified layer's output.
        attend: normed hidden states [B, T, D] -> the unmodified attention module's output.
        rotary: (cos, sin), each [B·T, d], or None.
        kv_all: whether gradients of keys and values reach every row.
        compensate: whether kept rows stand in for those left out (`lemo.sparse.compensation`).
        tile_bytes: budget of one MLP row tile, 0 for no tiling.
        seed: of the dropout masks, None without dropout.
        attend_rows: (queries [H, N, d] of some rows, keys and values [K, B·T, d], scale, the rows on the CPU) ->
            [N, H, d], where the dense forward's attention was sparse; None: every key is seen.
    """

    view: LayerView
    layout: SequenceLayout
    choose: Callable[[Tensor], TokenPlan]
    dense: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor], Tensor]
    rotary: Rotary
    kv_all: bool
    compensate: bool
    tile_bytes: int
    seed: int | None
    attend_rows: Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor] | None = None
    parameters: tuple[torch.nn.Parameter, ...] = ()
    autocast: dict[str, Any] = field(default_factory=dict)

    def dropout(self) -> RowDropout | None:
        return None if self.seed is None else RowDropout(self.seed)

    def autocast_again(self) -> AbstractContextManager[Any]:
        return torch.autocast(**self.autocast) if self.autocast else nullcontext()


def run_layer(hidden_BTD: Tensor, call: BackwardCall) -> Tensor:
    """The layer's output [B, T, D]: dense in value, sparse in gradient."""
    device = hidden_BTD.device.type
    call.parameters = tuple(p for p in call.view.module.parameters() if p.requires_grad)
    # The weight cache holds graph nodes of the caller's pass; a recomputation must not touch them.
    call.autocast = {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": False,
    }
    return _BackwardSparseLayer.apply(hidden_BTD, call, *call.parameters)


class _BackwardSparseLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, call: BackwardCall, *parameters: Tensor) -> Tensor:
        ctx.call = call
        with ExitStack() as stack:
            stack.enter_context(part("forward"))
            stack.enter_context(call.view.fused())
            dropout = call.dropout()
            if dropout is not None:
                stack.enter_context(dropout)
            if call.view.post_norm:
                output, *sums = _dense_post_norm(hidden_BTD, call, dropout)
            else:
                output, sums = _dense_pre_norm(hidden_BTD, call, dropout), []
        ctx.save_for_backward(hidden_BTD, *sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Any, ...]:
        call: BackwardCall = ctx.call
        hidden_BTD, *sums = ctx.saved_tensors
        D = hidden_BTD.shape[-1]
        with part("selection"):
            plan = call.choose(grad_BTD)
        with ExitStack() as stack:
            stack.enter_context(call.autocast_again())
            stack.enter_context(call.view.fused())
            dropout = call.dropout()
            if dropout is not None:
                stack.enter_context(dropout)
            stack.enter_context(torch.enable_grad())
            backward = _backward_post_norm if call.view.post_norm else _backward_pre_norm
            hidden = hidden_BTD.reshape(-1, D).detach().requires_grad_(ctx.needs_input_grad[0])
            grad_hidden, grads = backward(hidden, sums, grad_BTD.reshape(-1, D), plan, call, dropout)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.view_as(hidden_BTD)
        return grad_hidden, None, *grads


def _tiles(rows: int, row_bytes: int, call: BackwardCall) -> list[slice]:
    """Row tiles that fit the budget; one of all rows if tiling is off or everything fits."""
    step = rows
    if call.tile_bytes:
        step = min(rows, max(1, call.tile_bytes // max(1, row_bytes)))
        # Matrix products work in tiles of up to 256 rows: a part of one costs as much as a whole.
        if _WHOLE < step < rows:
            step -= step % _WHOLE
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _normed_in_tiles(hidden_BTD: Tensor, call: BackwardCall) -> Tensor:
    """The attention branch's norm: its fp32 copies exist for a tile at a time."""
    hidden_ND = hidden_BTD.reshape(call.layout.rows, -1)
    # Copied to fp32, squared, scaled.
    tiles = _tiles(hidden_ND.shape[0], 3 * 4 * hidden_ND.shape[1], call)
    if len(tiles) == 1:
        return call.view.attention_norm(hidden_BTD)
    first = call.view.attention_norm(hidden_ND[tiles[0]])
    normed_ND = first.new_empty(hidden_ND.shape)
    normed_ND[tiles[0]] = first
    for tile in tiles[1:]:
        normed_ND[tile] = call.view.attention_norm(hidden_ND[tile])
    return normed_ND.view(hidden_BTD.shape)


def _add_mlp_in_tiles(mid_ND: Tensor, call: BackwardCall, dropout: RowDropout | None, pre_norm: bool) -> None:
    """mid += mlp(mid), tile by tile, in place: no full-width intermediate."""
    site = dropout.site if dropout is not None else 0
    for tile in _tiles(mid_ND.shape[0], call.view.mlp_row_bytes, call):
        rows = torch.arange(tile.start, tile.stop, device=mid_ND.device)
        with on_rows(dropout, rows, site):
            mid_nD = mid_ND[tile]
            mid_nD += call.view.mlp(call.view.mlp_norm(mid_nD) if pre_norm else mid_nD)


def _dense_pre_norm(hidden_BTD: Tensor, call: BackwardCall, dropout: RowDropout | None) -> Tensor:
    if len(_tiles(call.layout.rows, call.view.mlp_row_bytes, call)) == 1:
        return call.dense(hidden_BTD)
    mid = hidden_BTD + call.attend(_normed_in_tiles(hidden_BTD, call))
    _add_mlp_in_tiles(mid.view(call.layout.rows, -1), call, dropout, pre_norm=True)
    return mid


def _dense_post_norm(hidden_BTD: Tensor, call: BackwardCall, dropout: RowDropout | None) -> tuple[Tensor, ...]:
    """Output and the two sums the norms see: their backward needs every row's, kept or not."""
    sum_attention = hidden_BTD + call.attend(hidden_BTD)
    sum_mlp = call.view.attention_norm(sum_attention).clone()
    _add_mlp_in_tiles(sum_mlp.view(call.layout.rows, -1), call, dropout, pre_norm=False)
    return call.view.mlp_norm(sum_mlp), sum_attention, sum_mlp


def _attention_branch(
    hidden_ND: Tensor, plan: TokenPlan, call: BackwardCall, dropout: RowDropout | None
) -> tuple[Tensor, Tensor]:
    """(residual, attention output) of the kept rows, each [kept, D], with gradients as `kv_grad` says."""
    view, rows = call.view, plan.rows
    rotary = call.rotary
    kept_rotary = None if rotary is None else (rotary[0][rows], rotary[1][rows])

    def normed(hidden: Tensor) -> Tensor:
        return hidden if view.post_norm else view.attention_norm(hidden)

    residual = hidden_ND[rows]
    if call.kv_all:
        with part("keys and values"):
            everything = normed(hidden_ND)
        with on_rows(dropout, rows):
            q = view.query(everything[rows], kept_rotary)
        with part("keys and values"), on_rows(dropout, None):
            k, v = view.key_value(everything, rotary)
    else:
        kept = normed(residual)
        with on_rows(dropout, rows):
            q = view.query(kept, kept_rotary)
        site = dropout.site if dropout is not None else 0
        with part("keys and values"), torch.no_grad(), on_rows(dropout, None):
            k, v = view.key_value(normed(hidden_ND), rotary)
        with on_rows(dropout, rows, site):
            k_kept, v_kept = view.key_value(kept, kept_rotary)
        k, v = k.index_copy(1, rows, k_kept), v.index_copy(1, rows, v_kept)
    if call.attend_rows is None:
        context = attend_rows(view, q, k, v, plan, None, call.layout, dropout)
    else:
        context = call.attend_rows(q, k, v, view.scaling, plan.host_rows).reshape(len(rows), -1)
    with on_rows(dropout, rows):
        return residual, view.attention_output(context)


def _backward_pre_norm(
    hidden: Tensor,
    sums: list[Tensor],
    grad: Tensor,
    plan: TokenPlan,
    call: BackwardCall,
    dropout: RowDropout | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    if not plan.rows.numel():
        return (grad if hidden.requires_grad else None), [None] * len(call.parameters)
    with part("recompute"):
        residual, attention = _attention_branch(hidden, plan, call, dropout)
        mid = residual + attention
        with on_rows(dropout, plan.rows):
            branch = call.view.mlp(call.view.mlp_norm(mid))
    with part("compensation"):
        rest = Compensation(grad, plan, call.layout, call.compensate)
    grad_hidden, grads = _grad((attention, branch), hidden, call, (rest.entering, rest.entering))
    if grad_hidden is not None:
        with part("compensation"):
            returned = grad_hidden[plan.rows] if rest.needed else None
            # Along the residual stream every row passes its own gradient, kept or not.
            grad_hidden += grad.to(grad_hidden.dtype)
            if returned is not None:
                rest.add(grad_hidden, returned)
    return grad_hidden, grads


def _backward_post_norm(
    hidden: Tensor,
    sums: list[Tensor],
    grad: Tensor,
    plan: TokenPlan,
    call: BackwardCall,
    dropout: RowDropout | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Norms on the residual path are never masked, so they run backward over all rows, the branches over the kept."""
    view, rows = call.view, plan.rows
    sum_attention, sum_mlp = (s.reshape(hidden.shape).detach().requires_grad_() for s in sums)
    grad_mid, norm_grads = _grad((view.mlp_norm(sum_mlp),), sum_mlp, call, (grad,))
    assert grad_mid is not None
    mid = view.attention_norm(sum_attention)
    # Forward order fixes the dropout sites: attention first, then the MLP.
    attention = _attention_branch(hidden, plan, call, dropout)[1] if rows.numel() else None
    if rows.numel():
        kept_mid = mid[rows].detach().requires_grad_()
        with on_rows(dropout, rows):
            branch = view.mlp(kept_mid)
        rest = Compensation(grad_mid, plan, call.layout, call.compensate)
        grad_kept, mlp_grads = _grad((branch,), kept_mid, call, (rest.entering,))
        assert grad_kept is not None
        grad_mid = grad_mid.index_add(0, rows, grad_kept.to(grad_mid.dtype))
        rest.add(grad_mid, grad_kept)
        norm_grads = _sum_grads(norm_grads, mlp_grads)
    grad_sum, more = _grad((mid,), sum_attention, call, (grad_mid,))
    assert grad_sum is not None
    grads = _sum_grads(norm_grads, more)
    grad_hidden = grad_sum if hidden.requires_grad else None
    if attention is not None:
        rest = Compensation(grad_sum, plan, call.layout, call.compensate)
        through_attention, more = _grad((attention,), hidden, call, (rest.entering,))
        grads = _sum_grads(grads, more)
        if grad_hidden is not None and through_attention is not None:
            grad_hidden = grad_hidden + through_attention
            rest.add(grad_hidden, through_attention[rows])
    return grad_hidden, grads


def _grad(
    outputs: tuple[Tensor, ...], leaf: Tensor, call: BackwardCall, grad_outputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of `outputs` with respect to `leaf` (None if it needs none) and the layer's parameters."""
    inputs = [*([leaf] if leaf.requires_grad else []), *call.parameters]
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    if not inputs or not pairs:
        return None, [None] * len(call.parameters)
    found, entering = zip(*pairs, strict=True)
    with part("backward"):
        grads: list[Tensor | None] = list(torch.autograd.grad(found, inputs, entering, allow_unused=True))
    first = grads.pop(0) if leaf.requires_grad else None
    return first, grads


def _sum_grads(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    return [a if b is None else b if a is None else a + b for a, b in zip(left, right, strict=True)]
