"""PEFT's LoRA layers, made to add their product in place while a sparse layer runs (`lemo.sparse.low_rank`).

Only where it is the same sum in another order of rounding: plain LoRA around a linear, in half precision. In fp32
PEFT's own code runs, so that hidden states stay bitwise the unmodified model's. Whatever isn't recognised (DoRA,
dropout in effect, an adapter switched off or merged, another kind of layer) runs PEFT's own code too, and the log says
so once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lemo.models.frozen import computes_in_half, output_of, untouched, unwatched
from lemo.sparse.low_rank import Added, add_low_rank

_log = logging.getLogger("lemo")


def fused_linear(module: nn.Module) -> Callable[..., Tensor] | None:
    """What to run in place of a plain LoRA layer's `forward`; None for any other.

    Its base is still called as a module if it trains or somebody watches it.
    """
    if not isinstance(module, LoraLayer):
        return None
    reason = _reason_against(module)
    if reason:
        _note(reason)
        return None
    return functools.partial(_forward, module)


def _reason_against(layer: Any) -> str | None:
    if type(layer) is not LoraLinear:
        return f"{type(layer).__module__}.{type(layer).__qualname__} isn't PEFT's plain LoRA linear"
    if layer.disable_adapters or layer.merged:
        return "the adapter is switched off or merged"
    names = _active(layer)
    if not names:
        return "no adapter is active"
    if not unwatched(layer.base_layer):
        return "hooks on the linear, which would see its output change"
    all_a, all_b, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout
    for name in names:
        a, b, dropout = all_a[name], all_b[name], dropouts[name]
        if name in layer.lora_variant:
            return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
        if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
            return "LoRA matrices with a bias, or that aren't linears"
        if not all(map(untouched, (a, b, dropout))):
            return "hooks on LoRA's matrices or dropout, or another forward of theirs"
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0:
            return "LoRA dropout"
        if not isinstance(dropout, (nn.Identity, nn.Dropout)):
            return f"LoRA dropout of type {type(dropout).__name__}"
    return None


@functools.cache
def _note(reason: str) -> None:
    _log.info("LoRA's product isn't fused with its linear: %s", reason)


def _active(layer: Any) -> list[str]:
    there = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in there]


def linears_of_one_input(modules: Sequence[Any], x_NI: Tensor) -> list[Tensor]:
    """Outputs of several linears; of those that are fused LoRA layers to which nobody listens the products together."""
    layers = [module for module in modules if computes_in_half(x_NI) and _is_fused_alone(module)]
    if not layers:
        return [module(x_NI) for module in modules]
    added = [_added(module, _active(module)[0], *output_of(module.base_layer, x_NI)) for module in layers]
    others = {module: module(x_NI) for module in modules if module not in layers}
    sums = dict(zip(layers, add_low_rank(x_NI, *added), strict=True)) | others
    return [sums[module] for module in modules]


def matrices_of(modules: Sequence[Any], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of those modules that are plain LoRA layers with one active adapter, where the matrices are whole there.

    Sharded ones aren't (FSDP, ZeRO), nor those that a hook brings when their layer runs.
    """
    found = []
    for layer in modules:
        names = _active(layer) if isinstance(layer, LoraLinear) else []
        if len(names) == 1:
            # Past nn.Module's attributes, which cost more than all else here.
            a, b = (_whole(layer._modules[kind]._modules[names[0]], device) for kind in ("lora_A", "lora_B"))
            if a is not None and b is not None:
                found.append((a, b))
    return [a for a, _ in found], [b for _, b in found]


def _whole(linear: Any, device: torch.device) -> Tensor | None:
    """A linear's weight, if all of it lies there."""
    weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
    if type(weight) is not nn.Parameter or weight.device != device or not weight.is_contiguous():
        return None
    return weight if weight.shape == (linear.out_features, linear.in_features) else None


def _is_fused_alone(module: Any) -> bool:
    """Whether `fused_linear` gave it its `forward`, one adapter is active, and no hook wants its input or output."""
    if getattr(module.__dict__.get("forward"), "func", None) is not _forward or len(_active(module)) != 1:
        return False
    return unwatched(module)


def _added(layer: Any, name: str, y_NO: Tensor, weight_OI: Tensor | None) -> Added:
    return Added(y_NO, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], weight_OI)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Arguments are `adapter_names` and what variants take. With gradients only rows of tokens: in-place autograd on a
    # view copies it.
    if args or kwargs or not computes_in_half(x) or (torch.is_grad_enabled() and x.dim() != 2):
        return type(layer).forward(layer, x, *args, **kwargs)
    x_NI = x if x.dim() == 2 else x.flatten(0, -2)
    first, *others = _active(layer)
    (y_NO,) = add_low_rank(x_NI, _added(layer, first, *output_of(layer.base_layer, x_NI)))
    for name in others:
        (y_NO,) = add_low_rank(x_NI, _added(layer, name, y_NO, None))
    return y_NO if x.dim() == 2 else y_NO.view(*x.shape[:-1], y_NO.shape[-1])
