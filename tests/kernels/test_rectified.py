"""ReLU that keeps bits against torch's own, bit by bit; and what an OPT layer stores with it."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch import nn
from torch.nn import functional as F

from lemo.kernels import reference
from lemo.models.fused import fused
from lemo.sparse import rectified as functions

pytest.importorskip("triton")
from lemo.kernels import rectified as kernels

SHAPES = [(0, 7), (1, 1), (5, 33), (64, 64), (3, 4099)]
ODD = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-7, -1e-7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_own(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape).to(DEVICE, dtype)
    x.flatten()[: len(ODD)] = torch.tensor(ODD, device=DEVICE, dtype=dtype)[: x.numel()]
    x.requires_grad_()
    grad = torch.randn(shape).to(DEVICE, dtype)
    wanted = F.relu(x)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    for run in (kernels, reference):
        with monkeypatch.context() as patch:
            poisoned(patch)
            out, bits = run.rectify(x.detach())
            found = run.rectify_backward(grad, bits)
        assert (bits.dtype, len(bits)) == (torch.uint8, -(-x.numel() // 8))
        torch.testing.assert_close(out, wanted.detach(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, wanted_grad, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_function_keeps_bits_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "rectified_backend", lambda *_: backend)
    x = torch.randn(6, 40, device=DEVICE).T.requires_grad_()
    stored: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        out = functions.rectified(x)
    assert [(y.dtype, y.numel()) for y in stored] == [(torch.uint8, 30)]
    grad = torch.randn(6, 40, device=DEVICE).T
    (wanted,) = torch.autograd.grad(F.relu(x), x, grad)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("store_less", [True, False])
def test_a_frozen_mlp_stores_a_bit_a_number(store_less: bool) -> None:
    up, down, relu = nn.Linear(16, 64, device=DEVICE), nn.Linear(64, 16, device=DEVICE), nn.ReLU()
    for linear in (up, down):
        linear.requires_grad_(False)
    x = torch.randn(10, 16, device=DEVICE, requires_grad=True)
    (wanted,) = torch.autograd.grad(down(relu(up(x))).square().sum(), x)
    stored: list[torch.Tensor] = []
    with (
        fused((), (), (), [relu, nn.ReLU(inplace=True), nn.GELU()], store_less),
        torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x),
    ):
        out = down(relu(up(x)))
    wide = [y for y in stored if y.numel() == 640]
    assert (len(wide), any(y.dtype == torch.uint8 for y in stored)) == ((0, True) if store_less else (1, False))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], wanted, rtol=0, atol=0)
