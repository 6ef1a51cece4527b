"""Tensors computed again in the backward: the same gradients, once for all who wait, nothing kept afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.sparse.recompute import recomputed


def test_saved_by_promise_and_computed_once_for_all() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    calls: list[Tensor] = []

    def again() -> Tensor:
        calls.append(x.detach().exp())
        return calls[-1]

    wide = x.detach().exp()
    with recomputed(wide, again):
        out = sum(wide @ w for w in weights)
    assert not calls
    # What was there is no longer needed.
    kept = wide.clone()
    wide.fill_(float("nan"))
    assert isinstance(out, Tensor)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, weights, grad, retain_graph=True)
    assert len(calls) == 1
    for gradient in found:
        torch.testing.assert_close(gradient, kept.T @ grad)
    # The graph may be gone through again.
    again_found = torch.autograd.grad(out, weights, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, again_found, strict=True))


def test_other_tensors_are_saved_as_they_are() -> None:
    x, w = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    view = x[:3]
    with recomputed(x, lambda: torch.full_like(x, float("nan"))):
        out = view @ w
    (gradient,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(gradient, view.T @ torch.ones_like(out))


def test_without_a_promise_or_gradients_nothing_happens() -> None:
    x, w = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    with recomputed(x, None):
        out = x @ w
    torch.testing.assert_close(torch.autograd.grad(out.sum(), w)[0], x.T @ torch.ones_like(out))
    with torch.no_grad(), recomputed(x, lambda: x):
        assert not (x @ w).requires_grad
