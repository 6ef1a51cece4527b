"""Sparsified models are copied and pickled as any model: the copy is a sparsified model of its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import attends, config, step

import lemo
from reference import assert_same_gradients
from tiny import build, layers_of, make_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "backward": {"fidelity": 0.6},
    "segments": {"policy": "segments", "segments": {"spans": 3, "drawn": 1}},
    "forward": {"mode": "forward", "keep": 0.5, "dense_share": 0.3},
    "dense": {"mode": "dense"},
    "attend": {"fidelity": 0.6, "attend": attends("random")},
    "attend forward": {"mode": "forward", "keep": 0.5, "attend": attends("half")},
}


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [saved_and_loaded, copy.deepcopy], ids=["saved", "copied"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_copy_trains_as_its_model(family: str, name: str, again: Callable[[Any], Any], device: torch.device) -> None:
    model = lemo.sparsify(build(family, device), config(**SETTINGS[name]))
    # transformers' hook for it can't be pickled, sparsified or not.
    if again is copy.deepcopy:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch("right", device, label_all=name == "segments")
    step(model, batch)
    twin = again(model)
    torch.manual_seed(3)
    loss, want = step(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(3)
    found, got = step(twin, batch)
    assert torch.equal(found, loss)
    assert_same_gradients(got, want, rel=0.0)
    plain = build(family, device)
    lemo.restore(twin)
    assert [type(layer) for layer in layers_of(twin)] == [type(layer) for layer in layers_of(plain)]
    assert twin(**batch.inputs()).logits is not None


def test_a_copy_has_bypasses_that_train(device: torch.device) -> None:
    model = lemo.sparsify(build("llama", device), config(mode="forward", keep=0.5, train_bypass=True))
    batch = make_batch("plain", device)
    lemo.models.fit_bypasses(model, [{"input_ids": batch.input_ids}], rank=4)
    twin = saved_and_loaded(model)
    (_, want), (_, got) = step(model, batch), step(twin, batch)
    assert any("lemo_bypasses" in key for key in want)
    assert_same_gradients(got, want, rel=0.0)
