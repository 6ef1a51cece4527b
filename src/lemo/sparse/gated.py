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
        if ctx.silu and gated_backend(gate, up) == "triton":
            from lemo.kernels.gated import silu_times_backward

            return *silu_times_backward(grad.contiguous(), gate.contiguous(), up.contiguous()), None, None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return of_gate, grad * active.detach(), None, None
