"""The residual stream of one layer, read and added to in place, under autograd.

A layer owns a stream [B, T, D]: a copy of its input, which others may hold (hidden states asked for, a checkpoint, a
leaf). From then on a branch reads its rows (`read_rows`, `read_normed`) and adds its output (`add_rows`) where they
lie, so that a branch neither makes nor stores anything of T rows. What its backward needs is compact: the rows as they
were read. The gradient of the stream is treated alike: a branch's share is added to it in place, which is why
`own_gradient` copies what comes from outside.

Each function marks the stream as changed even where it only reads: so the stream stays one chain in the graph, and its
gradient is one tensor passed from function to function, never a sum of two. Rejected: one function for a whole branch
with `torch.autograd.grad` inside, which would store the same and need the parameters listed.

Shapes: N rows moved, D width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lemo.kernels import reference
from lemo.kernels.dispatch import movement_backend
from lemo.sparse.precision import computes_in
from lemo.types import NormWeights


def own_stream(hidden_BTD: Tensor) -> Tensor:
    """A stream that begins as a layer's input."""
    return hidden_BTD.clone(memory_format=torch.contiguous_format)


def own_gradient(stream_BTD: Tensor) -> Tensor:
    """The same stream; its gradient, which may be anybody's, is copied here, so that functions below may add to it."""
    return _OwnGradient.apply(stream_BTD)


def read_rows(stream_BTD: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same stream, and its rows [N, D].

    Args:
        stream_BTD: owned.
        rows_N: int64, distinct.
    """
    return _ReadRows.apply(stream_BTD, rows_N)


def read_normed(stream_BTD: Tensor, rows_N: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same stream, the norm of its rows [N, D], and, where a gradient may be asked for, the rows before the norm.

    Args:
        stream_BTD: owned.
        rows_N: int64, distinct.
        norm: of the branch; its parameters may train.
    """
    dtype = computes_in(stream_BTD.device.type, torch.promote_types(stream_BTD.dtype, norm.weight.dtype))
    return _ReadNormed.apply(stream_BTD, rows_N, norm.weight, norm.bias, norm.eps, norm.centered, dtype)


def norm_again(kept_ND: Tensor, norm: NormWeights, dtype: torch.dtype) -> Tensor:
    """The norm of rows that `read_normed` gave, once more, without a graph."""
    weight, bias = norm.weight.detach(), None if norm.bias is None else norm.bias.detach()
    ops = _ops(kept_ND, weight)
    return ops.gather_norm(kept_ND, None, weight, bias, norm.eps, centered=norm.centered, dtype=dtype)[0]


def add_rows(stream_BTD: Tensor, rows_N: Tensor, branch_ND: Tensor, *, last: bool = False) -> Tensor:
    """The stream with `branch` added to its rows, in place.

    Args:
        stream_BTD: owned.
        rows_N: int64, distinct.
        branch_ND: any floating dtype.
        last: `own_gradient` of it too, by the same function.
    """
    return _AddRows.apply(stream_BTD, rows_N, branch_ND, last)


def _ops(*tensors: Tensor) -> ModuleType:
    """The kernels, or their twins."""
    if movement_backend(*tensors) == "torch":
        return reference
    from lemo.kernels import movement

    return movement


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_BTD: Tensor) -> Tensor:
        ctx.mark_dirty(stream_BTD)
        return stream_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> Tensor:
        return grad_BTD.clone(memory_format=torch.contiguous_format)


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_BTD: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(stream_BTD)
        ctx.save_for_backward(rows_N)
        return stream_BTD, _ops(stream_BTD).gather_rows(_flat(stream_BTD), rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (rows_N,) = ctx.saved_tensors
        _ops(grad_BTD, grad_ND).add_rows_(_flat(grad_BTD), rows_N, grad_ND.contiguous())
        return grad_BTD, None


class _ReadNormed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream_BTD: Tensor,
        rows_N: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        eps: float,
        centered: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ops = _ops(stream_BTD, weight_D)
        normed_ND, kept_ND = ops.gather_norm(
            _flat(stream_BTD), rows_N, weight_D, bias_D, eps,
            centered=centered, dtype=dtype, keep_rows=any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.mark_dirty(stream_BTD)
        if kept_ND is not None:
            ctx.mark_non_differentiable(kept_ND)
        ctx.save_for_backward(rows_N, kept_ND, weight_D)
        ctx.settings = eps, centered
        return stream_BTD, normed_ND, kept_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor, grad_ND: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows_N, kept_ND, weight_D = ctx.saved_tensors
        eps, centered = ctx.settings
        wants_stream, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        of_weight, of_bias = _ops(kept_ND, grad_ND, weight_D).add_norm_gradient_(
            _flat(grad_BTD) if wants_stream else None, rows_N, grad_ND.contiguous(), kept_ND, weight_D, eps,
            centered=centered, parameters=wants_weight or wants_bias,
        )  # fmt: skip
        return (
            grad_BTD if wants_stream else None,
            None,
            of_weight.to(weight_D.dtype) if wants_weight else None,
            of_bias.to(weight_D.dtype) if wants_bias else None,
            None,
            None,
            None,
        )


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_BTD: Tensor, rows_N: Tensor, branch_ND: Tensor, last: bool) -> Tensor:
        _ops(stream_BTD, branch_ND).add_rows_(_flat(stream_BTD), rows_N, branch_ND.contiguous())
        ctx.mark_dirty(stream_BTD)
        ctx.save_for_backward(rows_N)
        ctx.dtype, ctx.last = branch_ND.dtype, last
        return stream_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_N,) = ctx.saved_tensors
        wants_stream, _, wants_branch, _ = ctx.needs_input_grad
        if ctx.last:
            grad_BTD = grad_BTD.clone(memory_format=torch.contiguous_format)
        of_branch = _ops(grad_BTD).gather_rows(_flat(grad_BTD), rows_N, ctx.dtype) if wants_branch else None
        return grad_BTD if wants_stream else None, None, of_branch, None


def _flat(x_BTD: Tensor) -> Tensor:
    """Its rows, [B·T, D], of a contiguous tensor."""
    return x_BTD.view(-1, x_BTD.shape[-1])
