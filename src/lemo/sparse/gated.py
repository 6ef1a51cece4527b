"""A gated MLP's activation times its projection, of which the backward keeps gate and projection alone.

As modules compute `act(gate) * up` autograd keeps three tensors of the MLP's width, here two; the activation is made
anew in the backward, products of matrices never are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lemo.kernels.dispatch import gated_backend
from lemo.sparse.precision import products_in

Activation = Callable[[Tensor], Tensor]


def gated(gate: Tensor, up: Tensor, activation: Activation, *, silu: bool) -> Tensor:
    """`activation(gate) * up`.

    Args:
        gate, up: of one shape.
        activation: by element, without parameters.
        silu: whether it is SiLU, which a kernel has.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation, silu)
    return product(gate, up, activation, silu=silu)


def gated_of_frozen(
    x_NI: Tensor, gate_NF: Tensor, up_NF: Tensor, weights: tuple[Tensor, Tensor], activation: Activation, *, silu: bool
) -> Tensor:
    """The same of `x @ weight.T` and what else was added, made without a graph: x gets its gradient here, one tensor.

    Args:
        x_NI: input of both linears.
        gate_NF, up_NF: their outputs.
        weights: theirs, [F, I] each, in the outputs' dtype.
        activation, silu: as above.
    """
    if torch.is_grad_enabled() and x_NI.requires_grad:
        return _GatedOfFrozen.apply(x_NI, gate_NF, up_NF, weights, activation, silu)
    return product(gate_NF, up_NF, activation, silu=silu)


def product(gate: Tensor, up: Tensor, activation: Activation, *, silu: bool) -> Tensor:
    """The same, without a graph."""
    with torch.no_grad():
        if silu and gated_backend(gate, up) == "triton":
            from lemo.kernels.gated import silu_times

            return silu_times(gate.contiguous(), up.contiguous())
        return activation(gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, silu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.silu = activation, silu
        return product(gate, up, activation, silu=silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *_gradients(grad, gate, up, ctx.activation, ctx.silu), None, None


class _GatedOfFrozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        gate: Tensor,
        up: Tensor,
        weights: tuple[Tensor, Tensor],
        activation: Activation,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, *weights)
        ctx.activation, ctx.silu, ctx.dtype = activation, silu, x_NI.dtype
        return product(gate, up, activation, silu=silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, of_gate_FI, of_up_FI = ctx.saved_tensors
        of_gate, of_up = _gradients(grad, gate, up, ctx.activation, ctx.silu)
        with products_in(grad.device.type, gate.dtype):
            of_x = (of_gate @ of_gate_FI).addmm_(of_up, of_up_FI)
        return of_x.to(ctx.dtype), None, None, None, None, None


def _gradients(grad: Tensor, gate: Tensor, up: Tensor, activation: Activation, silu: bool) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    if silu and gated_backend(gate, up) == "triton":
        from lemo.kernels.gated import silu_times_backward

        return silu_times_backward(grad.contiguous(), gate.contiguous(), up.contiguous())
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = activation(leaf)
    (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
    return of_gate, grad * active.detach()
