"""Frozen linears, whose backward a function after them does: their output needs no graph, only their weight is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lemo.kernels.dispatch import HALF
from lemo.sparse.precision import computes_in


def computes_in_half(x: Tensor) -> bool:
    """Whether products with x are in half precision; in fp32 numbers stay bitwise the unmodified model's."""
    return computes_in(x.device.type, x.dtype) in HALF


def is_frozen(linear: Any, x: Tensor) -> bool:
    """Whether a module is an `nn.Linear` that neither trains nor is watched, in the dtype of its product with x.

    Its weight is a plain matrix: a tensor that only poses as one (quantised, sharded) has products of its own.
    """
    if type(linear) is not nn.Linear or not untouched(linear) or type(linear.weight) is not nn.Parameter:
        return False
    trains = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    return not trains and linear.weight.dtype == computes_in(x.device.type, x.dtype)


def output_of(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A module's output; and its weight [O, I] if it is a frozen linear, whose output then has no graph."""
    if not is_frozen(linear, x):
        return linear(x), None
    with torch.no_grad():
        return linear(x), linear.weight


def unwatched(module: nn.Module) -> bool:
    """Whether no hook sees the module's input or output."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def untouched(module: nn.Module) -> bool:
    """Whether nobody watches it, and nobody gave it another `forward`."""
    return "forward" not in module.__dict__ and unwatched(module)
