"""Rotation of queries and keys in one pass: against its twin in fp64, transformers' own, and where it isn't known."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch import Tensor

from lemo.kernels import dispatch, reference
from lemo.models import rotary
from lemo.sparse.rotary import rotate

pytest.importorskip("triton")
from lemo.kernels import rotary as kernels

SHAPES = [(1, 1, 1, 2), (5, 3, 1, 6), (7, 6, 2, 16), (3, 32, 8, 128), (0, 2, 1, 8)]
MODELS = ("llama", "mistral", "qwen2", "qwen3")
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries and keys of N of 4 N rows, by heads out of a wider projection; cos and sin of unequal halves."""
    N, H, K, d = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(4 * N, generator=generator)[:N].sort().values.to(DEVICE)
    x = torch.randn(N, H + K, d, generator=generator).to(DEVICE, dtype)
    angle = torch.randn(4 * N, d, generator=generator).to(DEVICE)
    return x[:, :H], x[:, H:], angle.cos().to(dtype), angle.sin().to(dtype), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_rotation_in_fp64(shape, dtype, monkeypatch):
    q, k, cos, sin, rows = draw(shape, dtype)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    wanted = reference.rotate(*leaves, cos.double(), sin.double(), rows)
    grads = [torch.randn_like(x).to(dtype) for x in wanted]
    right = [*wanted, *torch.autograd.grad(wanted, leaves, [x.double() for x in grads])]
    for run in (kernels, reference):
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = [*run.rotate(q, k, cos, sin, rows), *run.rotate(*grads, cos, sin, rows, transposed=True)]
        for mine, exact in zip(found, right, strict=True):
            assert (mine.dtype, mine.shape) == (dtype, exact.shape)
            torch.testing.assert_close(mine.double(), exact.detach(), rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def apply(rotation: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> list[Tensor]:
    """Values and gradients of q and k through `lemo.models.rotary`."""
    q, k, *rest = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    out = rotary.rotated(rotation, *leaves, *rest)
    # Gradients as attention may hand them over: by heads, or with their numbers apart.
    grads = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.mT.shape).mT.to(x.dtype) for x in out]
    return [x.detach().double() for x in (*out, *torch.autograd.grad(out, leaves, grads))]


@pytest.mark.parametrize("model", MODELS)
def test_no_further_from_fp64_than_transformers_own(model, monkeypatch):
    own = import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    assert rotary._reason_against(own) is None
    q, k, cos, sin, rows = draw((64, 6, 2, 32), torch.float16)
    monkeypatch.setattr(rotary, "rotary_backend", lambda *_: "torch")
    exact = apply(own, *(x.double() for x in (q, k, cos, sin)), rows)
    theirs = apply(own, q, k, cos, sin, rows)
    monkeypatch.setattr(rotary, "rotary_backend", lambda *_: "triton")
    ours = apply(own, q, k, cos, sin, rows)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.shape == right.shape
        assert 0 < (mine - right).norm() <= 1.05 * (other - right).norm()


def test_what_is_not_known_is_called(monkeypatch):
    monkeypatch.setattr(dispatch, "_reason_against_any", lambda _: None)
    q, k, cos, sin, rows = draw((5, 2, 1, 8), torch.float16)
    calls = []

    def other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(cos.shape)
        return q + 1, k + 1

    found = rotary.rotated(other, q, k, cos, sin, rows)
    assert calls == [(1, 5, 8)]
    torch.testing.assert_close(found[0], q.transpose(0, 1) + 1)
    known = import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    for change in (torch.float32, torch.float64):
        assert dispatch.rotary_backend(q.to(change), k.to(change), cos.to(change), None) == "torch"
    assert dispatch.rotary_backend(q, k, cos.float(), None) == "torch"
    assert dispatch.rotary_backend(q, k, cos[:, :4], None) == "torch"
    assert dispatch.rotary_backend(q, k, cos, rotary._reason_against(known)) == "triton"


def test_nothing_of_the_heads_is_stored():
    q, k, cos, sin, rows = draw((5, 2, 1, 8), torch.float32)
    stored: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.data_ptr()) or x, lambda x: x):
        rotate(q.requires_grad_(), k, cos, sin, rows)
    assert stored == [x.data_ptr() for x in (cos, sin, rows)]
