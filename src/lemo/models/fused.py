"""Parts of a layer that take fewer passes over memory, or store less, while it runs sparsely: where recognised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from lemo.kernels.dispatch import HALF, plain_torch
from lemo.models.lora import fused_linear, matrices_of
from lemo.models.mlps import fused_activation, fused_mlp
from lemo.models.norms import fused_norm
from lemo.sparse.low_copies import copied
from lemo.sparse.precision import computes_in


@contextmanager
def fused(
    linears: Iterable[nn.Module],
    norms: Iterable[nn.Module],
    mlps: Iterable[nn.Module] = (),
    activations: Iterable[nn.Module] = (),
    store_less: bool = False,
) -> Iterator[None]:
    """Inside, recognised instances have another `forward`; one that somebody else has given theirs keeps it.

    `LEMO_KERNELS=torch` changes none. `store_less`: cheap inputs that linears save are computed again in the backward,
    and of activations bits are kept.
    """
    if plain_torch():
        yield
        return
    found = [(module, fused_linear(module)) for module in linears] + [(module, fused_norm(module)) for module in norms]
    found += [(module, fused_mlp(module, store_less)) for module in mlps]
    found += [(module, fused_activation(module)) for module in activations if store_less]
    changed = [(module, run) for module, run in found if run is not None and "forward" not in module.__dict__]
    for module, run in changed:
        module.__dict__["forward"] = run
    try:
        yield
    finally:
        for module, _ in changed:
            del module.__dict__["forward"]


def low_copies(
    linears_by_input: Iterable[list[nn.Module]], device: torch.device, dtype: torch.dtype
) -> AbstractContextManager[None]:
    """Inside, LoRA's matrices of all these linears are there in half precision, if products are computed in it.

    Args:
        linears_by_input: those that run on one input together; on another device they cast for themselves.
        device, dtype: of the hidden states.
    """
    dtype = computes_in(device.type, dtype)
    if dtype not in HALF or plain_torch():
        return nullcontext()
    groups = [matrices_of(linears, device) for linears in linears_by_input]
    return copied([group for group in groups if group[0]], dtype)
