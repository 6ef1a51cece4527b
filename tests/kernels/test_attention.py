"""Attention of selected rows against its twin in fp64: values, every gradient, odd shapes, nothing left unwritten."""

from __future__ import annotations

import os

import pytest
import torch

from lemo.kernels import reference

triton = pytest.importorskip("triton")
from lemo.kernels import attention as kernels  # noqa: E402

DEVICE = os.environ.get("LEMO_TEST_DEVICE", "cpu")
# The interpreter computes bf16 products wrongly.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)


def causal(rows, documents=((0, None),), window=None):
    """lo, hi of query rows over all keys."""
    lo = torch.zeros_like(rows)
    for first, _ in documents:
        lo = torch.where(rows >= first, first, lo)
    if window is not None:
        lo = torch.maximum(lo, rows - window + 1)
    return lo.int(), rows.int()


def every_block(keys, block, step, first=0):
    """Rows of every `step`-th block."""
    rows = torch.arange(keys)
    return rows[(rows // block) % step == first]


CASES = {
    "all rows": (torch.arange(130), 130, {}),
    "one row": (torch.tensor([70]), 71, {}),
    "first row": (torch.tensor([0]), 5, {}),
    "blocks": (every_block(300, 16, 3), 300, {}),
    "wide blocks": (every_block(512, 64, 4, 1), 512, {}),
    "late": (torch.arange(200, 333), 333, {}),
    "scattered": (torch.arange(0, 259, 7), 259, {}),
    "documents": (every_block(300, 16, 2), 300, {"documents": ((0, 50), (50, 130), (130, 300))}),
    "window": (every_block(300, 16, 2), 300, {"window": 40}),
    "narrow window": (torch.arange(300), 300, {"window": 1}),
    "both": (every_block(300, 8, 2), 300, {"window": 30, "documents": ((0, 90), (90, 300))}),
    "padding after": (torch.arange(20, 90), 200, {"documents": ((20, 90),)}),
}
HEADS = {"grouped": (6, 2), "equal": (2, 2), "one": (3, 1)}


def draw(rows, keys, heads, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    H, K = heads
    # Strides of a projection seen by heads.
    return (
        normal(len(rows), H, d).transpose(0, 1),
        normal(keys, K, d).transpose(0, 1),
        normal(keys, K, d).transpose(0, 1),
        normal(len(rows), H, d),
    )


def exact(q, k, v, grad, lo, hi, scale, dtype=torch.float64):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, lo, hi, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten is NaN."""
    empty = torch.empty

    def nan(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


def run(q, k, v, grad, lo, hi, scale):
    out, lse = kernels.attention_forward(q, k, v, lo, hi, scale)
    return [out, *kernels.attention_backward(grad, q, k, v, out, lse, lo, hi, scale)]


def error(found, wanted, grad):
    """Relative; where the truth is nothing (one key only: its probability is 1), relative to the gradient given."""
    size, given = wanted.norm(), grad.double().norm()
    return float((found.double() - wanted).norm() / (size if size > 1e-6 * given else given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_twins(case, dtype, monkeypatch):
    check(CASES[case], HEADS["grouped"], 16, dtype, monkeypatch)


@pytest.mark.parametrize("d", [8, 40, 64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_head_size_and_grouping(heads, d, monkeypatch):
    check(CASES["blocks"], HEADS[heads], d, DTYPES[-1], monkeypatch)


def check(case, heads, d, dtype, monkeypatch):
    rows, keys, bounds = case
    lo, hi = (x.to(DEVICE) for x in causal(rows, **bounds))
    q, k, v, grad = draw(rows, keys, heads, d, dtype)
    scale = d**-0.5
    wanted = exact(q, k, v, grad, lo, hi, scale)
    plain = exact(q, k, v, grad, lo, hi, scale, dtype)
    poisoned(monkeypatch)
    for name, found, right, low in zip(
        ("o", "q", "k", "v"), run(q, k, v, grad, lo, hi, scale), wanted, plain, strict=True
    ):
        assert found.dtype == dtype
        assert torch.isfinite(found).all(), name
        # No worse than plain attention in the same precision.
        limit = error(low, right, grad) + {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert error(found, right, grad) <= limit, f"{name}: {error(found, right, grad):.2e} over {limit:.2e}"


def test_keys_that_nobody_sees_get_exactly_zero(monkeypatch):
    rows = torch.arange(100, 140)
    lo, hi = (x.to(DEVICE) for x in causal(rows, documents=((100, 200),)))
    q, k, v, grad = draw(rows, 260, (2, 1), 16, torch.float32)
    poisoned(monkeypatch)
    _, _, dk, dv = run(q, k, v, grad, lo, hi, 0.25)
    for x in (dk, dv):
        assert (x[:, :100] == 0).all()
        assert (x[:, 140:] == 0).all()
        assert (x[:, 100:140] != 0).any()


def test_no_query_at_all():
    q, k, v, grad = draw(torch.arange(0), 50, (2, 1), 16, torch.float32)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    out, dq, dk, dv = run(q, k, v, grad, none, none, 1.0)
    assert out.shape == (0, 2, 16)
    assert dq.shape == (2, 0, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()


def test_large_scores_dont_overflow():
    rows = every_block(200, 16, 2)
    lo, hi = (x.to(DEVICE) for x in causal(rows))
    q, k, v, grad = draw(rows, 200, (2, 1), 16, torch.float32)
    q = q * 300
    results = (run(q, k, v, grad, lo, hi, 1.0), exact(q, k, v, grad, lo, hi, 1.0))
    for found, right, low in zip(*results, exact(q, k, v, grad, lo, hi, 1.0, torch.float32), strict=True):
        assert error(found, right, grad) <= error(low, right, grad) + 3e-4
