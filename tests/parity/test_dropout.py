"""Dropout: a recomputed row sees its forward's mask, so the gradient is that of the loss that was computed.

There is no reference with the same masks, so the loss itself is: with one seed it is a fixed function of the
parameters, and its directional derivative must be what the gradient says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import config, pair, rows_of_plans
from torch import Tensor, nn

from reference import gradients
from tiny import Batch, make_batch

# where dropout can act: attention weights, LoRA's input, OPT's branch outputs
PLACES: dict[str, dict[str, Any]] = {
    "attention": {"attention_dropout": 0.3},
    "lora": {"lora_dropout": 0.3},
    "both": {"attention_dropout": 0.2, "lora_dropout": 0.2},
}
MODELS = [(f, p) for f in ("llama", "opt") for p in PLACES] + [(f, "both") for f in ("mistral", "qwen3", "opt-350m")]
SMOOTH = {"activation_function": "gelu"}  # a difference quotient across relu's kinks measures the kinks


def _values(family: str, place: str) -> dict[str, Any]:
    opt = {"dropout": 0.2, **SMOOTH} if family.startswith("opt") else {}
    return PLACES[place] | opt | {"dtype": torch.float64}


def _loss(model: nn.Module, batch: Batch, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(**batch.inputs()).loss


def _move(parameters: dict[str, nn.Parameter], direction: dict[str, Tensor], step: float) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(direction[name], alpha=step)


def check_directional_derivative(model: nn.Module, batch: Batch, seed: int = 11, rel: float = 1e-3) -> None:
    """The loss's slope in a direction must be the gradient's projection on it.

    Central differences with one Richardson step; transformers' RMSNorm and the loss round to fp32, which bounds `rel`.
    """
    _loss(model, batch, seed).backward()
    gradient = gradients(model)
    parameters = {n: p for n, p in model.named_parameters() if n in gradient}
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
    generator = torch.Generator().manual_seed(0)
    noise = {
        n: torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.device) for n, g in gradient.items()
    }
    size = torch.cat([g.flatten() for g in noise.values()]).norm()
    # mostly along the gradient, where a wrong one shows, and partly in a direction it didn't choose
    direction = {n: 0.8 * g / norm + 0.6 * noise[n] / size for n, g in gradient.items()}

    def difference(step: float) -> float:
        ends = []
        for sign in (1, -1):
            _move(parameters, direction, sign * step)
            ends.append(_loss(model, batch, seed).item())
            _move(parameters, direction, -sign * step)
        return (ends[0] - ends[1]) / (2 * step)

    slope = (4 * difference(0.004) - difference(0.008)) / 3
    assert slope == pytest.approx(sum((gradient[n] * direction[n]).sum().item() for n in gradient), rel=rel)


@pytest.mark.parametrize(("family", "place"), MODELS)
def test_gradient_of_the_loss_that_was_computed(family: str, place: str, device: torch.device) -> None:
    _, sparse = pair(family, device, config(fidelity=1.0), **_values(family, place))
    check_directional_derivative(sparse, make_batch("left", device))


@pytest.mark.parametrize(("family", "place"), MODELS)
def test_compacted_rows_keep_their_masks(family: str, place: str, device: torch.device) -> None:
    """One layer, labels at the documents' ends: only labelled blocks have a gradient at the layer's output, so keeping
    just those blocks, other rows than the first ones, still gives the exact gradient."""
    settings = config(fidelity=0.01)
    _, sparse = pair(family, device, settings, **_values(family, place), num_hidden_layers=1)
    check_directional_derivative(sparse, make_batch("right", device))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compacted_rows_keep_their_masks_when_packed(family: str, device: torch.device) -> None:
    settings = config(fidelity=0.01)
    _, sparse = pair(family, device, settings, **_values(family, "both"), num_hidden_layers=1)
    check_directional_derivative(sparse, make_batch("packed", device))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["backward", "forward"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_checkpointing_recomputes_the_same_masks(family: str, mode: str, reentrant: bool, device: torch.device) -> None:
    settings = config(mode="forward", keep=0.6) if mode == "forward" else config(fidelity=1.0)
    _, sparse = pair(family, device, settings, **_values(family, "both"))
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    sparse.enable_input_require_grads()
    check_directional_derivative(sparse, make_batch("right", device))


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_masks_do_not_depend_on_grad_mode(mode: str, device: torch.device) -> None:
    settings = config(mode="forward", keep=0.6) if mode == "forward" else config(fidelity=1.0)
    _, sparse = pair("llama", device, settings, **_values("llama", "both"))
    batch = make_batch("right", device)
    with torch.no_grad():
        without = _loss(sparse, batch, 4).item()
    assert without == _loss(sparse, batch, 4).item()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_forward_mode(family: str, device: torch.device) -> None:
    settings = config(mode="forward", keep=0.6)
    _, sparse = pair(family, device, settings, **_values(family, "both"))
    batch = make_batch("right", device)
    check_directional_derivative(sparse, batch)
    _loss(sparse, batch, 11)
    plans = rows_of_plans(sparse)
    assert any(len(rows) < int(batch.real_mask().sum()) for rows in plans.values())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("tile_mib", [0.0, 0.002])
def test_loss_depends_on_the_seed_and_on_nothing_else(family: str, tile_mib: float, device: torch.device) -> None:
    batch = make_batch("left", device)
    losses = {}
    for fidelity in (1.0, 0.5):
        settings = config(fidelity=fidelity, tile_mib=tile_mib)
        _, sparse = pair(family, device, settings, **_values(family, "both"))
        losses[fidelity] = [_loss(sparse, batch, seed).item() for seed in (1, 2, 1)]
    assert losses[1.0][0] == losses[1.0][2], "one seed, one loss"
    assert losses[1.0][0] != losses[1.0][1], "another seed, another mask"
    assert losses[0.5] == pytest.approx(losses[1.0], rel=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropout_acts_at_its_rate(family: str, place: str, device: torch.device) -> None:
    """Masks are really drawn and really scaled: the mean loss over seeds is near that of transformers' own dropout."""
    values = _values(family, place) | {"dtype": torch.float32}
    dense, sparse = pair(family, device, config(), **values)
    batch = make_batch("plain", device, label_all=True)
    batch.labels = batch.input_ids.clone()
    with torch.no_grad():
        mine = torch.tensor([_loss(sparse, batch, seed).item() for seed in range(40)])
        theirs = torch.tensor([_loss(dense, batch, seed).item() for seed in range(40)])
    error = (mine.var() / 40 + theirs.var() / 40).sqrt()
    assert mine.std() > 0.3 * theirs.std() > 0
    assert abs(mine.mean() - theirs.mean()) <= 4 * error


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_attention_dropout_alone_is_in_effect(mode: str, device: torch.device) -> None:
    settings = config(mode="forward", keep=0.6) if mode == "forward" else config(fidelity=0.5)
    _, sparse = pair("llama", device, settings, **_values("llama", "attention"))
    batch = make_batch("right", device)
    first, second = (_loss(sparse, batch, seed).item() for seed in (1, 2))
    assert first != second
