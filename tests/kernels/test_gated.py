"""SiLU times a projection against its twin in fp64, and the function that recomputes it."""

from __future__ import annotations

import copy

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lemo.kernels import reference
from lemo.models import mlps
from lemo.models.fused import fused
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


@pytest.mark.parametrize("silu", [True, False])
def test_frozen_linears_pass_their_inputs_gradient_on(silu):
    x, of_gate, of_up = (torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in ((6, 5), (9, 5), (9, 5)))
    x.requires_grad_()
    activation = F.silu if silu else F.gelu
    wanted = activation(x @ of_gate.T) * (x @ of_up.T)
    outputs = [(x @ weight.T).detach() for weight in (of_gate, of_up)]
    found = functions.gated_of_frozen(x, *outputs, (of_gate, of_up), activation, silu=silu)
    torch.testing.assert_close(found, wanted)
    right, mine = (torch.autograd.grad(y.square().sum(), x)[0] for y in (wanted, found))
    torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("case", ["frozen", "one trains", "watched", "fp32", "batch"])
def test_only_frozen_linears_of_rows_in_half_precision_go_without_a_graph(case, monkeypatch):
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24)).to(DEVICE).requires_grad_(False)
    mlp.up_proj.weight.requires_grad_(case == "one trains")
    exact, low = copy.deepcopy(mlp), mlp if case == "fp32" else mlp.to(torch.bfloat16)
    exact.load_state_dict(low.state_dict())
    x = torch.randn(*([2, 150] if case == "batch" else [300]), 32, device=DEVICE).to(low.up_proj.weight.dtype)
    calls, seen = [], []
    of_frozen = mlps.gated_of_frozen
    monkeypatch.setattr(mlps, "gated_of_frozen", lambda *a, **k: calls.append(1) or of_frozen(*a, **k))
    if case == "watched":
        low.gate_proj.register_forward_hook(lambda *_: seen.append(1))

    def gradients(module, x):
        leaf = x.detach().clone().requires_grad_()
        out = module(leaf)
        inputs = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out.float().square().sum(), inputs))]

    right, own = gradients(exact, x.float()), gradients(low, x)
    seen.clear()
    with fused((), (), [low]):
        found = gradients(low, x)
    assert (len(calls), len(seen)) == (case == "frozen", case == "watched")
    for mine, theirs, wanted in zip(found, own, right, strict=True):
        assert (mine - wanted).norm() <= 1.05 * (theirs - wanted).norm() + 1e-12
