"""Leaving nothing out equals the unmodified model, bitwise where nothing is tiled (DESIGN 4.1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from pairs import TINY_TILE_MIB, config, pair, step
from torch import nn

import lemo
from reference import assert_same_gradients, explicit_masks, gradients, hooks, record_layers
from tiny import CASES, FAMILIES, Batch, build, make_batch

NOTHING_LEFT_OUT = {
    "backward": {"fidelity": 1.0},
    "forward": {"mode": "forward", "keep": 1.0},
    "dense": {"mode": "dense"},
}
MODE_CASES = [(f, n, m) for f, n in CASES for m in NOTHING_LEFT_OUT if m != "dense" or f in ("llama", "opt")]


def _isolate(family: str, model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Own masks for OPT's packed documents, which transformers lets see each other."""
    return (
        hooks(explicit_masks(model, batch))
        if family.startswith("opt") and batch.position_ids is not None
        else nullcontext()
    )


@pytest.mark.parametrize(("family", "name", "mode"), MODE_CASES)
def test_hidden_states(family: str, name: str, mode: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(**NOTHING_LEFT_OUT[mode]))
    batch = make_batch(name, device)
    want: list[torch.Tensor] = []
    got: list[torch.Tensor] = []
    with hooks(record_layers(dense, want)), _isolate(family, dense, batch):
        dense(**batch.inputs())
    with hooks(record_layers(sparse, got)):
        output = sparse(**batch.inputs())
    assert output.logits is None
    real = batch.real_mask()
    assert len(got) == len(want) == 3
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[real], theirs[real])


@pytest.mark.parametrize(("family", "name", "mode"), MODE_CASES)
def test_loss_and_gradients_with_tiles(family: str, name: str, mode: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(**NOTHING_LEFT_OUT[mode], tile_mib=TINY_TILE_MIB))
    batch = make_batch(name, device, label_all=name in ("left", "packed"))
    with _isolate(family, dense, batch):
        want_loss, want = step(dense, batch)
    loss, got = step(sparse, batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("mode", ["backward", "forward"])
@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_extended_context(rope_type: str, mode: str, device: torch.device) -> None:
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4}
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = 32
    dense, sparse = pair("llama", device, config(**NOTHING_LEFT_OUT[mode]), rope_parameters=rope)
    batch = make_batch("packed", device)
    want: list[torch.Tensor] = []
    got: list[torch.Tensor] = []
    with hooks(record_layers(dense, want)), hooks(record_layers(sparse, got)):
        _, want_gradients = step(dense, batch)
        _, got_gradients = step(sparse, batch)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert_same_gradients(got_gradients, want_gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_trained(family: str, attention: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(fidelity=1.0), lora=False, attention=attention)
    batch = make_batch("right", device)
    want_loss, want = step(dense, batch)
    loss, got = step(sparse, batch)
    assert len(want) == len(list(dense.parameters()))
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("mode", NOTHING_LEFT_OUT)
def test_gradients_reach_inputs_embeds(mode: str, device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(**NOTHING_LEFT_OUT[mode]))
    batch = make_batch("right", device)
    found = []
    for model in (dense, sparse):
        embeds = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        inputs = {key: value for key, value in batch.inputs().items() if key != "input_ids"}
        model(inputs_embeds=embeds, **inputs).loss.backward()
        found.append({"inputs_embeds": embeds.grad})
        gradients(model)
    assert_same_gradients(found[1], found[0])


def test_a_label_predicted_by_padding_counts_as_in_transformers(device: torch.device) -> None:
    """With left padding a label at the first real token is predicted by a padding row, and transformers counts it."""
    dense, sparse = pair("qwen3", device, config(mode="dense"))
    batch = make_batch("left", device, label_all=True)
    batch.labels = torch.where(batch.real_mask(), batch.input_ids, batch.labels)
    want, want_gradients = step(dense, batch)
    loss, got = step(sparse, batch)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert torch.isfinite(loss)
    assert_same_gradients(got, want_gradients)


LEAVES_PADDING_OUT = {
    **{mode: values for mode, values in NOTHING_LEFT_OUT.items() if mode != "dense"},
    "segments": {"policy": "segments", "segments": {"spans": 2, "drawn": 2}},
    "attend": {"mode": "dense", "attend": {"density": 1.0, "block": 2}},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", LEAVES_PADDING_OUT)
def test_a_label_predicted_by_padding_is_an_error_where_padding_is_left_out(
    mode: str, side: str, device: torch.device
) -> None:
    sparse = lemo.sparsify(build("qwen3", device), config(**LEAVES_PADDING_OUT[mode]))
    batch = make_batch(side, device, label_all=True)
    step(sparse, batch)
    batch.labels = batch.input_ids
    with pytest.raises(ValueError, match=r"padding predicts a label.*set it to -100.*pad on the right"):
        step(sparse, batch)


def test_a_loss_outside_that_counts_padding_is_an_error(device: torch.device) -> None:
    """TRL computes one; its gradient would be lost."""
    sparse = lemo.sparsify(build("llama", device), config(fidelity=1.0))
    batch = make_batch("left", device)
    hidden, head = lemo.models.backbone_hidden(sparse, **batch.inputs(labels=False))
    logits = head(hidden)
    logits[batch.real_mask()].square().sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="padding predicts a label"):
        logits.square().sum().backward()


@pytest.mark.parametrize("name", ["left", "packed2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_unmodified_model(family: str, name: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.5))
    batch = make_batch(name, device)
    dense.eval(), sparse.eval()
    with torch.no_grad():
        with _isolate(family, dense, batch):
            want = dense(**batch.inputs())
        got = sparse(**batch.inputs())
    real = batch.real_mask()
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    hidden, head = lemo.models.backbone_hidden(sparse, **batch.inputs(labels=False))
    torch.testing.assert_close(head(hidden)[real], want.logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", NOTHING_LEFT_OUT)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_loss_does_not_depend_on_grad_mode(family: str, mode: str, device: torch.device) -> None:
    """A training loss looked at without gradients is the training loss, for OPT's packed documents too."""
    _, sparse = pair(family, device, config(**NOTHING_LEFT_OUT[mode]))
    batch = make_batch("packed", device)
    with torch.no_grad():
        without = sparse(**batch.inputs()).loss
    torch.testing.assert_close(without, sparse(**batch.inputs()).loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", NOTHING_LEFT_OUT)
def test_a_micro_batch_without_labels_adds_nothing(mode: str, device: torch.device) -> None:
    """Under accumulation one micro-batch may have no label: transformers gives a zero loss and zero gradients."""
    dense, sparse = pair("llama", device, config(**NOTHING_LEFT_OUT[mode]))
    batch = make_batch("plain", device)
    batch.labels = torch.full_like(batch.labels, -100)
    want, _ = step(dense, batch, num_items_in_batch=7)
    loss, got = step(sparse, batch, num_items_in_batch=7)
    assert loss.item() == want.item() == 0.0
    assert all(not g.any() for g in got.values())
