"""Parts of a layer that take fewer passes over memory, or store less, while it runs sparsely: where recognised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lemo.kernels.dispatch import plain_torch
from lemo.models.lora import fused_linear
from lemo.models.mlps import fused_mlp
from lemo.models.norms import fused_norm


@contextmanager
def fused(
    linears: Iterable[nn.Module],
    norms: Iterable[nn.Module],
    mlps: Iterable[nn.Module] = (),
    store_less: bool = False,
) -> Iterator[None]:
    """Inside, recognised instances have another `forward`; one that somebody else has given theirs keeps it.

    `LEMO_KERNELS=torch` changes none. `store_less`: cheap inputs that linears save are computed again in the backward.
    """
    if plain_torch():
        yield
        return
    found = [(module, fused_linear(module)) for module in linears] + [(module, fused_norm(module)) for module in norms]
    found += [(module, fused_mlp(module, store_less)) for module in mlps]
    changed = [(module, run) for module, run in found if run is not None and "forward" not in module.__dict__]
    for module, run in changed:
        module.__dict__["forward"] = run
    try:
        yield
    finally:
        for module, _ in changed:
            del module.__dict__["forward"]
