"""The loss's kernel against torch in fp64; and the segmented loss with it, in place over a plain head's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.loss import segmented, segmented_cross_entropy, token_losses

pytest.importorskip("triton")
from lemo.kernels import cross_entropy

SIZES = [(1, 1), (3, 7), (5, 1000), (2, 8192), (3, 20000)]


def wanted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "V"), SIZES)
def test_equals_the_twin(C: int, V: int, dtype: torch.dtype, scale: float, monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    # More columns than there are, which nobody may touch.
    stored = (scale * torch.randn(C, V + 3, generator=generator)).to(DEVICE, dtype)
    stored[:, V:] = float("nan")
    logits = stored[:, :V]
    labels = torch.randint(V, (C,), generator=generator)
    labels[0], labels[-1] = 0, V - 1
    labels = labels.to(DEVICE)
    losses, gradient = wanted(logits, labels)
    poisoned(monkeypatch)
    kept = stored.clone()
    found = cross_entropy.row_losses(logits, labels, gradient=False)
    assert torch.equal(stored.nan_to_num(7), kept.nan_to_num(7))
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)
    again = cross_entropy.row_losses(logits, labels, gradient=True)
    assert torch.equal(again, found)
    assert stored[:, V:].isnan().all()
    # Rounded once, to the logits' dtype.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(logits.double(), gradient, **tolerance)


def test_a_sure_label_has_a_small_gradient_not_none() -> None:
    logits = torch.zeros(1, 100, device=DEVICE)
    logits[0, 3] = 25.0
    label = torch.tensor([3], device=DEVICE)
    _, gradient = wanted(logits, label)
    cross_entropy.row_losses(logits, label, gradient=True)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=0)
    assert logits[0, 3] < 0


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_outside_the_vocabulary_is_no_number(label: int) -> None:
    logits = torch.zeros(3, 5, device=DEVICE)
    losses = cross_entropy.row_losses(logits, torch.tensor([0, label, 4], device=DEVICE), gradient=False)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.fixture
def by_kernel(monkeypatch: Any) -> list[int]:
    """Takes the kernel wherever a head allows it; the numbers of rows it was given."""
    rows: list[int] = []
    run = cross_entropy.row_losses

    def counted(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
        rows.append(len(logits))
        return run(logits, labels, gradient=gradient)

    monkeypatch.setattr(segmented, "loss_backend", lambda x, plain: "triton" if plain else "torch")
    monkeypatch.setattr(cross_entropy, "row_losses", counted)
    return rows


def draw(head: nn.Module) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(11, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = torch.arange(11, device=DEVICE) % 9
    labels[::4] = -100
    return hidden, labels


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "head trains"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_segmented_loss_is_the_same(bias: bool, trains: bool, by_kernel: list[int]) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 9, bias=bias, device=DEVICE).requires_grad_(trains)
    hidden, labels = draw(head)
    leaf = hidden.clone().requires_grad_()
    segmented_cross_entropy(leaf, head, labels, chunk_rows=3).backward()
    assert by_kernel == [3, 3, 2]
    found = [leaf.grad, *(p.grad for p in head.parameters() if trains)]
    head.zero_grad()
    other = hidden.clone().requires_grad_()
    F.cross_entropy(head(other), labels).backward()
    for a, b in zip(found, [other.grad, *(p.grad for p in head.parameters() if trains)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    losses = token_losses(hidden, head, labels)
    torch.testing.assert_close(losses, F.cross_entropy(head(hidden), labels, reduction="none"), rtol=1e-5, atol=1e-6)


class Capped(nn.Linear):
    """Its output is saved for its backward: nothing may be written over it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def test_other_heads_keep_their_logits(by_kernel: list[int]) -> None:
    torch.manual_seed(0)
    hooked = nn.Linear(6, 9, device=DEVICE)
    hooked.register_forward_hook(lambda module, inputs, output: torch.tanh(output))
    for head in (Capped(6, 9, device=DEVICE), hooked):
        hidden, labels = draw(head)
        leaf, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        segmented_cross_entropy(leaf, head, labels).backward()
        F.cross_entropy(head(other), labels).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert by_kernel == []


def test_its_chunks_are_larger(by_kernel: list[int]) -> None:
    hidden = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert segmented._chunk_rows(nn.Linear(4, 128_256, device="meta"), hidden, None) == 1024
    assert segmented._chunk_rows(Capped(4, 128_256, device="meta"), hidden, None) == 256
