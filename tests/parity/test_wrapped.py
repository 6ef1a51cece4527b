"""Wrappers that run a part of the model again in the backward (activation checkpointing of FSDP, of users) change
nothing: what was drawn, chosen and seen the first time is again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import attends, config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import lemo
from reference import assert_same_gradients, gradients
from tiny import Batch, build, causal_lm, layers_of, make_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "backward": {"fidelity": 0.6},
    "random": {"policy": "random", "keep": 0.5, "labelled": "ranked"},
    "segments": {"policy": "segments", "segments": {"spans": 3, "drawn": 1}},
    "forward": {"mode": "forward", "keep": 0.5, "dense_share": 0.3},
    "attend": {"mode": "dense", "attend": attends("random"), "dense_share": 0.3},
    "attend labelled": {"mode": "dense", "attend": attends("labelled")},
    "backward attend": {"fidelity": 0.6, "attend": attends("sampled")},
    "forward attend": {"mode": "forward", "keep": 0.5, "attend": attends("sampled")},
}


class Whole(nn.Module):
    """The model, run again as a whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return checkpoint(self.model, use_reentrant=False, **inputs)


def wrapped(model: Any, what: str, implementation: CheckpointImpl) -> nn.Module:
    def wrap(parent: Any, name: str) -> None:
        parent._modules[name] = checkpoint_wrapper(getattr(parent, name), implementation)

    if what == "model":
        return Whole(model)
    if what == "decoder":
        inner = causal_lm(model).model
        wrap(*((inner, "decoder") if hasattr(inner, "decoder") else (causal_lm(model), "model")))
        return model
    model.enable_input_require_grads()
    for layer in layers_of(model):
        wrap(layer, "self_attn")
    if what == "layer":
        layers = layers_of(model)
        inner = causal_lm(model).model
        inner = getattr(inner, "decoder", inner)
        for i in range(len(layers)):
            wrap(inner.layers, str(i))
    return model


def result(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """All passes before the backward, as preference losses need."""
    torch.manual_seed(5)
    losses = [model(**batch.inputs()).loss for batch in batches]
    sum(losses).backward()
    found = {
        name.replace("_checkpoint_wrapped_module.", "").removeprefix("model."): g
        for name, g in gradients(model).items()
    }
    return torch.stack(losses).detach(), found


@pytest.mark.parametrize(
    ("what", "implementation"),
    [
        ("model", CheckpointImpl.NO_REENTRANT),
        ("decoder", CheckpointImpl.NO_REENTRANT),
        *[(what, kind) for what in ("layer", "attention") for kind in CheckpointImpl],
    ],
)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_what_runs_again_is_the_same(
    family: str, name: str, what: str, implementation: CheckpointImpl, device: torch.device
) -> None:
    batches = [make_batch(side, device, label_all=name in ("segments", "random")) for side in ("right", "left")]
    results = []
    for wraps in (False, True):
        model: Any = lemo.sparsify(build(family, device), config(**SETTINGS[name]))
        if wraps:
            model = wrapped(model, what, implementation)
        results.append(result(model, batches))
    (want_loss, want), (loss, got) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("implementation", CheckpointImpl)
@pytest.mark.parametrize("name", SETTINGS)
def test_models_wrapped_before(name: str, implementation: CheckpointImpl, device: torch.device) -> None:
    batches = [make_batch("right", device, label_all=name in ("segments", "random"))]
    _, want = result(lemo.sparsify(build("llama", device), config(**SETTINGS[name])), batches)
    model = wrapped(build("llama", device), "attention", implementation)
    _, got = result(lemo.sparsify(model, config(**SETTINGS[name])), batches)
    assert_same_gradients(got, want)
    lemo.restore(model)
    assert type(layers_of(model)[0].self_attn._checkpoint_wrapped_module) is type(
        layers_of(build("llama", device))[0].self_attn
    )
