"""The norm after the last layer is fused while tokens are left out, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lemo
from lemo.models import norms
from tiny import build, causal_lm, make_batch


@pytest.mark.parametrize(("mode", "fused"), [("backward", True), ("forward", True), ("dense", False)])
def test_the_last_norm(mode: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_DEVICES", ("cpu",))
    seen: list[int] = []
    own = norms.F.rms_norm

    def noted(hidden: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        seen.append(id(weight))
        return own(hidden, shape, weight, eps)

    monkeypatch.setattr(norms, "F", type("F", (), {"rms_norm": staticmethod(noted)}))
    model = build("llama", dtype=torch.bfloat16)
    more = {"keep": 0.5} if mode == "forward" else {}
    lemo.sparsify(model, lemo.SparsityConfig(mode=mode, **more))
    batch = make_batch("plain")
    model(**batch.inputs()).loss.backward()
    norm = causal_lm(model).model.norm
    assert (id(norm.weight) in seen) == fused
    assert "forward" not in norm.__dict__
    seen.clear()
    model.eval()(**batch.inputs(labels=False))
    assert not seen
