"""Frozen linears, whose backward a function after them does: their output needs no graph, only their weight is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

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
    weight, bias = linear.weight, linear.bias
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not trains and weight.dtype == computes_in(x.device.type, x.dtype)


def output_of(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A module's output; and its weight [O, I] if it is a frozen linear, whose output then has no graph."""
    return (frozen_output(linear, x), linear.weight) if is_frozen(linear, x) else (linear(x), None)


@torch.no_grad()
def frozen_output(linear: Any, x: Tensor) -> Tensor:
    """A frozen linear's output, without a graph; as nobody watches, what the module would call."""
    return F.linear(x, linear.weight, linear.bias)


def unwatched(module: nn.Module) -> bool:
    """Whether no hook sees the module's input or output, its own or one of all modules."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def untouched(module: nn.Module) -> bool:
    """Whether nobody watches it, and nobody gave it another `forward`."""
    return "forward" not in module.__dict__ and unwatched(module)
