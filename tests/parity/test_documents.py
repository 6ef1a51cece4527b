"""Packed and padded sequences without a T×T mask: the same loss and gradients, and no mask is ever built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import config, pair, step
from test_backward import hook_reference
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import lemo
from lemo.models import documents, get_runtime, mixins
from reference import assert_same_gradients, gradients
from tiny import CASES, build, make_batch

pytest.importorskip("triton")

RULE: dict[str, Any] = {"fidelity": 0.4, "block_size": 2}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel stands in for masks at any length and on any device; notes the implementation it stood in for."""
    stood_in: list[str] = []
    inner = documents._attend

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        stood_in.append(type(module).__name__)
        return inner(module, *args, **kwargs)

    monkeypatch.setattr(documents, "_LONG", 0)
    monkeypatch.setattr(documents, "attention_backend", lambda *args: "triton")
    monkeypatch.setattr(documents, "_attend", noted)
    return stood_in


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_equal_hooked_dense(
    family: str, name: str, device: torch.device, always: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = pair(family, device, config(**RULE))
    batch = make_batch(name, device)
    want_loss, _ = hook_reference(dense, batch, RULE)

    def none_wanted(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was built")

    if name != "plain":
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", none_wanted)
        monkeypatch.setattr(mixins, "document_mask", none_wanted)
    loss, got = step(sparse, batch)
    assert len(always) == (0 if name == "plain" else 3)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))
    assert sparse.config._attn_implementation == "sdpa"


def test_short_sequences_other_attention_and_dropout_keep_transformers_masks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch("packed", device)
    monkeypatch.setattr(documents, "_attend", None)
    lemo.sparsify(model := build("llama", device), config(**RULE))
    step(model, batch)
    monkeypatch.setattr(documents, "_LONG", 0)
    for options in ({"attention": "eager"}, {"attention_dropout": 0.1}):
        lemo.sparsify(model := build("llama", device, **options), config(**RULE))
        step(model, batch)


def test_evaluation_and_an_error_leave_the_implementation_alone(device: torch.device, always: list[str]) -> None:
    sparse = lemo.sparsify(build("llama", device), config(**RULE))
    batch = make_batch("packed", device)
    with torch.no_grad():
        sparse.eval()(**batch.inputs())
    assert not always
    sparse.train()
    runtime = get_runtime(sparse)
    assert runtime is not None
    layer = sparse.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        step(sparse, batch)
    assert sparse.config._attn_implementation == "sdpa"
