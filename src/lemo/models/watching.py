"""Watches the branches of a sparsified model's layers while the dense model runs: what goes in, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lemo.models.mixins import INDEX, VIEW
from lemo.models.view import ArchitectureView
from lemo.sparse.view import Rotary


@dataclass(frozen=True)
class BranchCall:
    """One call of one branch.

    Attributes:
        layer: its index.
        branch: `attention` or `mlp`.
        view: the layer.
        x: the branch's normalised input, flattened to rows, [B·T, D].
        y: its output, [B·T, D].
        rotary: (cos, sin) of the rows, or None; of attention alone.
    """

    layer: int
    branch: str
    view: ArchitectureView
    x: Tensor
    y: Tensor
    rotary: Rotary


@contextmanager
def watch(model: Any, visit: Callable[[BranchCall], None]) -> Iterator[None]:
    """Inside, `visit` is called after every branch of every layer that runs.

    Args:
        model: sparsified; in evaluation mode, so that the dense model runs.
        visit: must not keep the tensors of many calls.
    """
    layers = [module for module in model.modules() if INDEX in module.__dict__]
    handles = [handle for layer in layers for handle in _hooks(layer, visit)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: Any, visit: Callable[[BranchCall], None]) -> list[Any]:
    view: ArchitectureView = layer.__dict__[VIEW]
    index: int = layer.__dict__[INDEX]
    inputs: dict[str, tuple[Tensor, Any]] = {}

    def enters(branch: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            inputs[branch] = (x, kwargs.get("position_embeddings"))

        return hook

    def leaves(branch: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, pair = inputs.pop(branch)
            y = output[0] if isinstance(output, tuple) else output
            width = y.shape[-1]
            rotary: Rotary = None
            if pair is not None:
                cos, sin = (t.expand(*x.shape[:2], t.shape[-1]).reshape(-1, t.shape[-1]) for t in pair)
                rotary = (cos, sin)
            visit(BranchCall(index, branch, view, x.reshape(-1, width), y.reshape(-1, width), rotary))

        return hook

    first, last = view.mlp_ends
    return [
        view.attention_module.register_forward_pre_hook(enters("attention"), with_kwargs=True),
        view.attention_module.register_forward_hook(leaves("attention")),
        first.register_forward_pre_hook(enters("mlp"), with_kwargs=True),
        last.register_forward_hook(leaves("mlp")),
    ]
