"""SiLU times a projection against its twin in fp64, and the function that recomputes it."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch.nn import functional as F

from lemo.kernels import reference
from lemo.sparse import gated as functions

pytest.importorskip("triton")
from lemo.kernels import gated as kernels

SHAPES = [(0, 7), (1, 1), (5, 33), (64, 64), (3, 4096), (3, 4099)]
# In fp32 an exponent near 16 is off by 2^-20, and so is its power; else half a unit in the last place, and some.
ROUNDING = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torchs_own_in_fp64(shape, dtype, monkeypatch):
    gate, up, grad = (draw(shape, dtype, seed) for seed in range(3))
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    wanted = F.silu(leaves[0]) * leaves[1]
    right = [wanted.detach(), *torch.autograd.grad(wanted, leaves, grad.double())]
    for run in (kernels, reference):
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = [run.silu_times(gate, up), *run.silu_times_backward(grad, gate, up)]
        for mine, exact in zip(found, right, strict=True):
            assert (mine.dtype, mine.shape) == (dtype, exact.shape)
            torch.testing.assert_close(
                mine.double(), exact, rtol=ROUNDING[dtype], atol=1e-6 if dtype.itemsize == 4 else 1e-5
            )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_the_function_are_those_of_the_modules(silu, backend, monkeypatch):
    monkeypatch.setattr(functions, "gated_backend", lambda *_: backend)
    activation = F.silu if silu else F.gelu
    gate, up = (draw((6, 40), torch.float32, seed).requires_grad_() for seed in (0, 1))
    grad = draw((6, 40), torch.float32, 2)
    stored: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        out = functions.gated(gate, up, activation, silu=silu)
    assert [x.data_ptr() for x in stored] == [gate.data_ptr(), up.data_ptr()]
    wanted = activation(gate) * up
    torch.testing.assert_close(out, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(out, (gate, up), grad), torch.autograd.grad(wanted, (gate, up), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    again = functions.product(gate, up, activation, silu=silu)
    assert torch.equal(again, out)
    assert not again.requires_grad


def test_a_frozen_gate_gets_no_gradient():
    gate, up = draw((3, 5), torch.float32, 0), draw((3, 5), torch.float32, 1).requires_grad_()
    functions.gated(gate, up, F.silu, silu=True).sum().backward()
    assert gate.grad is None
    torch.testing.assert_close(up.grad, F.silu(gate))
