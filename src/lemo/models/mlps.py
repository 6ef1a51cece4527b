"""transformers' MLPs, run so that less is stored while a sparse layer runs (`lemo.sparse.gated`, `.rectified`).

Linears that train or that somebody watches are still called as modules. With `store_less` what `down` would save of its
input, for LoRA's gradient, is computed again too. Any other MLP runs its own code, and the log says so once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from lemo.models.frozen import computes_in_half, frozen_output, is_frozen
from lemo.sparse.gated import gated, gated_of_frozen, product
from lemo.sparse.recompute import recomputed
from lemo.sparse.rectified import rectified

# down(act(gate(x)) * up(x)), all of one text.
_KNOWN = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_log = logging.getLogger("lemo")


def fused_mlp(module: nn.Module, store_less: bool) -> Callable[[Tensor], Tensor] | None:
    """What to run in place of a known MLP's `forward`; None for any other module."""
    if reason := _reason_against(module):
        _note(reason)
        return None
    return functools.partial(_forward, module, store_less)


def fused_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What stores less in place of an activation's `forward`; None for any but ReLU."""
    return rectified if type(module) is nn.ReLU and not module.inplace else None


def _reason_against(module: Any) -> str | None:
    kind = type(module)
    if kind.__name__ not in _KNOWN or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__module__}.{kind.__qualname__} isn't a gated MLP that is known"
    if type(module.act_fn) not in _SILU and any(True for _ in module.act_fn.parameters()):
        return f"{type(module.act_fn).__qualname__} has parameters"
    return None


@functools.cache
def _note(reason: str) -> None:
    _log.info("the MLP's activation is stored: %s", reason)


def _forward(mlp: Any, store_less: bool, x: Tensor) -> Tensor:
    activation, silu = mlp.act_fn, type(mlp.act_fn) in _SILU
    linears = mlp.gate_proj, mlp.up_proj
    if x.dim() == 2 and computes_in_half(x) and all(is_frozen(linear, x) for linear in linears):
        gate, up = (frozen_output(linear, x) for linear in linears)
        wide = gated_of_frozen(x, gate, up, (linears[0].weight, linears[1].weight), activation, silu=silu)
    else:
        gate, up = (linear(x) for linear in linears)
        wide = gated(gate, up, activation, silu=silu)
    again = functools.partial(product, gate.detach(), up.detach(), activation, silu=silu)
    with recomputed(wide, again if store_less else None):
        return mlp.down_proj(wide)
