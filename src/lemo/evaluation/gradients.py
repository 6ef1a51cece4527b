"""How far a sparsified model's gradient is from the dense one, on one batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lemo.evaluation.modes import training_mode
from lemo.models import dense, get_runtime
from lemo.models.runtime import flag


class GradientAgreement(TypedDict):
    """Sparse against dense gradient of all trainable parameters together.

    Keys:
        cosine: of the angle between them; 0 if the sparse one vanishes.
        norm_ratio: sparse norm / dense norm.
    """

    cosine: float
    norm_ratio: float


def gradient_agreement(model: nn.Module, batch: Mapping[str, Any]) -> GradientAgreement:
    """Compares the gradient under the model's sparsity with the one that `lemo.models.dense` gives.

    Both passes start from the same random state. Nothing is left behind: gradients, the random state, statistics and
    train/eval modes are as before.

    Args:
        model: sparsified model with trainable parameters.
        batch: what the model is called with, labels included.

    Raises:
        ValueError: the model isn't sparsified, or its dense gradient is zero (no labels, nothing trainable).
    """
    runtime = get_runtime(model)
    if runtime is None:
        raise ValueError("this model isn't sparsified; call lemo.sparsify(model, config) first")
    # A pass that happens to be one of the dense ones would compare nothing.
    sparsely = runtime.config.model_copy(update={"dense_share": None})
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with _undisturbed(model, parameters), training_mode(model, True), flag(runtime, "config", sparsely):
        sparse = _gradients(model, inputs, parameters)
        with dense(model):
            exact = _gradients(model, inputs, parameters)
    product = sparse_square = exact_square = 0.0
    for a, b in zip(sparse, exact, strict=True):
        product += float((a.double() * b.double()).sum())
        sparse_square += float(a.double().square().sum())
        exact_square += float(b.double().square().sum())
    if exact_square == 0.0:
        raise ValueError("the dense gradient is zero: the batch has no labels, or the model no trainable parameters")
    cosine = product / (sparse_square * exact_square) ** 0.5 if sparse_square else 0.0
    return GradientAgreement(cosine=cosine, norm_ratio=(sparse_square / exact_square) ** 0.5)


def _gradients(model: nn.Module, inputs: Mapping[str, Any], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of the loss, zero where it doesn't reach; the random state is as before."""
    for parameter in parameters:
        parameter.grad = None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        loss = model(**inputs).loss
        if loss.requires_grad:
            loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@contextmanager
def _undisturbed(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Puts `.grad`s and the runtime's statistics back, whatever happens in between."""
    runtime = get_runtime(model)
    assert runtime is not None
    gradients = [p.grad for p in parameters]
    before = dict(vars(runtime))
    # Work on copies of everything that a pass changes in place (statistics, plans).
    runtime.state = None
    vars(runtime).update(copy.deepcopy({k: v for k, v in vars(runtime).items() if k != "config"}))
    try:
        yield
    finally:
        vars(runtime).update(before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
