"""`attend_rows` gives the same by the kernel as by the torch path, for every kind of batch it meets."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lemo.kernels.dispatch import attention_backend
from lemo.selection.layout import build_layout
from lemo.selection.ranking import plan_from_blocks
from lemo.sparse import attention

DEVICE = torch.device(os.environ.get("LEMO_TEST_DEVICE", "cpu"))
BATCHES: dict[str, dict[str, Any]] = {
    "one": {"batch": 1, "length": 150},
    "two": {"batch": 2, "length": 70},
    "left padding": {
        "batch": 2,
        "length": 70,
        "attention_mask": (torch.arange(70) >= torch.tensor([[0], [25]])).long(),
    },
    "packed": {"batch": 1, "length": 150, "position_ids": torch.cat([torch.arange(40), torch.arange(110)])[None]},
}


@pytest.mark.parametrize("compact", [False, True], ids=["all keys", "kept keys"])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("batch", BATCHES)
def test_kernel_and_torch_path_agree(batch, window, compact, monkeypatch):
    given = {key: x.to(DEVICE) if torch.is_tensor(x) else x for key, x in BATCHES[batch].items()}
    layout = build_layout(block_size=16, device=DEVICE, **given)
    blocks = layout.block_tokens.numel()
    plan = plan_from_blocks((torch.arange(blocks) % 3 != 1).to(DEVICE), layout)
    # Other rows than the queries', so that the plain causal shortcut isn't taken.
    keys = plan_from_blocks(torch.ones(blocks, dtype=torch.bool, device=DEVICE), layout) if compact else None
    view: Any = SimpleNamespace(window=window, scaling=0.3, attention_dropout=0.0)
    rows = layout.rows if keys is None else len(keys.rows)
    shapes = ((4, len(plan.rows), 16), (2, rows, 16), (2, rows, 16))
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    results = []
    for backend in ("triton", "torch"):
        monkeypatch.setattr(attention, "attention_backend", lambda *_, chosen=backend: chosen)
        out = attention.attend_rows(view, q, k, v, plan, keys, layout, None)
        assert out.shape == (len(plan.rows), 64)
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_cant_do_goes_to_torch():
    q, k, v = (torch.zeros(2, 8, 16, device=DEVICE) for _ in range(3))
    usual = "triton" if DEVICE.type == "cuda" else "torch"
    assert attention_backend(q, k, v, dropout=False) == usual
    assert attention_backend(q, k, v, dropout=True) == "torch"
    assert attention_backend(q, k.double(), v, dropout=False) == "torch"
    wide = torch.zeros(2, 8, 512, device=DEVICE)
    assert attention_backend(wide, wide, wide, dropout=False) == "torch"
