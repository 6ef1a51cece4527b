"""Fits the low-rank bypasses of a model in `forward` mode (`lemo.sparse.bypass`) on a sample of its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.mixins import INDEX, VIEW
from lemo.models.runtime import Runtime
from lemo.models.surgery import get_runtime
from lemo.models.view import ArchitectureView
from lemo.sparse.bypass import BypassFit

RANK = 64


@torch.no_grad()
def fit_bypasses(
    model: Any, batches: Iterable[Mapping[str, Tensor]], *, rank: int = RANK
) -> dict[tuple[int, str], float]:
    """From now on tokens left out of a branch get the output of a linear map of rank `rank` in the branch's place.

    The maps are fitted to what the branches of the dense model put out on the batches, padding left out. One pass, of
    which sums are kept: twice D² numbers a branch. They don't train, and `restore` takes them away.

    Args:
        model: sparsified with mode `forward`, PEFT or not; it stays in its train or eval mode.
        batches: `input_ids` [B, T] and, with padding, `attention_mask`, on the model's device. Some thousand tokens.
        rank: r; the hidden size is the most.

    Returns:
        (layer, 'attention' | 'mlp') -> share of the variance of the branch's output on the batches its map explains.

    Raises:
        ValueError: another mode, no batches, or a rank over the hidden size.
    """
    runtime = get_runtime(model)
    if runtime is None or runtime.config.mode != "forward":
        raise ValueError(
            "bypasses belong to mode forward; call lemo.sparsify with SparsityConfig(mode='forward') first"
        )
    fits: dict[tuple[int, str], BypassFit] = {}
    rows: list[Tensor] = []
    handles = [handle for layer in _layers(model, runtime) for handle in _watch(layer, fits, rows)]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            rows[:] = [torch.ones_like(ids).bool().flatten() if mask is None else mask.bool().flatten()]
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not fits:
        raise ValueError("fit_bypasses got no batches; give it some thousand tokens of the data")
    solved = {key: fit.solve(rank) for key, fit in fits.items()}
    runtime.bypasses = {key: bypass for key, (bypass, _) in solved.items()}
    return {key: explained for key, (_, explained) in solved.items()}


def _layers(model: Any, runtime: Runtime) -> list[nn.Module]:
    found = [module for module in model.modules() if INDEX in module.__dict__]
    assert len(found) == runtime.layers
    return found


def _watch(layer: Any, fits: dict[tuple[int, str], BypassFit], rows: list[Tensor]) -> list[Any]:
    """Hooks that add each branch's input and output to its fit."""
    view: ArchitectureView = layer.__dict__[VIEW]
    index: int = layer.__dict__[INDEX]
    inputs: dict[str, Tensor] = {}

    def enters(branch: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[branch] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def leaves(branch: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            width = y.shape[-1]
            fit = fits.setdefault((index, branch), BypassFit(width, y.device))
            fit.add(inputs.pop(branch).reshape(-1, width)[rows[0]], y.reshape(-1, width)[rows[0]])

        return hook

    first, last = view.mlp_ends
    return [
        view.attention_module.register_forward_pre_hook(enters("attention"), with_kwargs=True),
        view.attention_module.register_forward_hook(leaves("attention")),
        first.register_forward_pre_hook(enters("mlp"), with_kwargs=True),
        last.register_forward_hook(leaves("mlp")),
    ]
