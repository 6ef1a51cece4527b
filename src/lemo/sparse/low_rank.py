"""LoRA layers' products added in place, of linears that share their input: y += s (x Aᵀ) Bᵀ for each.

PEFT computes it as written: a copy of x in the adapter's fp32, the product in full width, its scaled copy, the sum.
Here the product accumulates onto y inside one matrix product, and x is stored once, in the dtype the linear computes
in. By the shapes of Llama-3-8B at 64K tokens that is 15 GB of traffic a layer in place of 60. Of all linears there is
one product of x with A, and the gradient of x is one tensor onto which each product accumulates.

Shapes: N rows, I and O a linear's widths, r rank, R ranks of all linears together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lemo.sparse.low_copies import in_dtype
from lemo.sparse.precision import products_in


@dataclass(frozen=True)
class Added:
    """What is added to one linear's output.

    Attributes:
        y: the linear's output, contiguous, [N, O]; its dtype is that of all products, the same for all linears.
        a, b: the adapter, [r, I] and [O, r], any floating dtype; gradients come back in theirs.
        scale: alpha / r, for one.
        weight: the linear's, [O, I] in y's dtype, if y was made of x without a graph; then x gets that gradient too.
    """

    y: Tensor
    a: Tensor
    b: Tensor
    scale: float
    weight: Tensor | None = None


def add_low_rank(x_NI: Tensor, *added: Added) -> tuple[Tensor, ...]:
    """`y + scale * (x @ a.T) @ b.T` of each, written over y, which must not be needed for y's own gradient.

    Args:
        x_NI: the linears' input, any floating dtype.
        added: one or more.
    """
    ys, a, b, scales = zip(*((one.y, one.a, one.b, one.scale) for one in added), strict=True)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_NI, *ys, *a, *b)):
        return _AddLowRank.apply(x_NI, scales, tuple(one.weight for one in added), *ys, *a, *b)
    _add(x_NI, scales, ys, a, b)
    return ys


def _add(
    x_NI: Tensor, scales: tuple[float, ...], ys: tuple[Tensor, ...], a: tuple[Tensor, ...], b: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """In place; returns x, x Aᵀ [N, R], A [R, I] and each B in y's dtype."""
    dtype = ys[0].dtype
    x_NI = x_NI.to(dtype)
    a_RI, low_b = in_dtype(a, b, dtype)
    # torch's autocast would leave the in-place product alone and refuse other dtypes.
    with products_in(x_NI.device.type, dtype):
        inner_NR = x_NI @ a_RI.T
        for y_NO, inner_Nr, b_Or, scale in zip(ys, _split(inner_NR, low_b), low_b, scales, strict=True):
            y_NO.addmm_(inner_Nr, b_Or.T, alpha=scale)
    return x_NI, inner_NR, a_RI, low_b


def _split(x_NR: Tensor, b: list[Tensor]) -> tuple[Tensor, ...]:
    """Each linear's columns."""
    return x_NR.split([b_Or.shape[1] for b_Or in b], 1)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, scales: tuple[float, ...], weights: tuple[Tensor | None, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        m = len(scales)
        ys, a, b = tensors[:m], tensors[m : 2 * m], tensors[2 * m :]
        low_NI, inner_NR, a_RI, low_b = _add(x_NI, scales, ys, a, b)
        ctx.mark_dirty(*ys)
        ctx.save_for_backward(low_NI, inner_NR, a_RI, *weights, *low_b)
        ctx.scales, ctx.dtypes = scales, (x_NI.dtype, a[0].dtype, b[0].dtype)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scales, (x_dtype, a_dtype, b_dtype) = ctx.scales, ctx.dtypes
        m = len(scales)
        x_NI, inner_NR, a_RI, *rest = ctx.saved_tensors
        weights, b = rest[:m], rest[m:]
        wants_x, _, _, *wanted = ctx.needs_input_grad
        wants_a, wants_b = any(wanted[m : 2 * m]), any(wanted[2 * m :])
        grad_x: Tensor | None = None
        grad_a: tuple[Tensor | None, ...] = (None,) * m
        grad_b: list[Tensor | None] = [None] * m
        with products_in(x_NI.device.type, x_NI.dtype):
            if wants_x or wants_a:
                through = [grad @ b_Or for grad, b_Or in zip(grads, b, strict=True)]
                through_NR = through[0] if m == 1 else torch.cat(through, 1)
                # Scaled here: r columns, not O; all at once where they are scaled alike.
                alike = len(set(scales)) == 1
                for part, scale in zip((through_NR,) if alike else _split(through_NR, b), scales, strict=False):
                    part.mul_(scale)
                if wants_x:
                    grad_x = through_NR @ a_RI
                    for grad, weight in zip(grads, weights, strict=True):
                        grad_x = grad_x if weight is None else grad_x.addmm_(grad, weight)
                    grad_x = grad_x.to(x_dtype)
                if wants_a:
                    grad_a = (through_NR.T @ x_NI).to(a_dtype).split([b_Or.shape[1] for b_Or in b])
            if wants_b:
                inner = _split(inner_NR, b)
                # With beta 0 nothing of the first operand is read: a product times a number.
                grad_b = [
                    torch.addmm(b_Or, grad.T, inner_Nr, beta=0, alpha=scale).to(b_dtype)
                    for b_Or, grad, inner_Nr, scale in zip(b, grads, inner, scales, strict=True)
                ]
        return grad_x, None, None, *grads, *grad_a, *grad_b
