"""Segmented cross-entropy equals full cross-entropy, gradients included, and makes no N×V tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lemo.loss import segmented_cross_entropy, token_losses

N, D, V = 13, 16, 37


class Net(nn.Module):
    """Embedding, one linear, head: the least that has a tied head and something before it."""

    def __init__(self, tied: bool = False, bias: bool = False, trainable: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.lm_head.requires_grad_(trainable)

    def hidden(self, tokens_N: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embed(tokens_N)))

    def forward(self, tokens_N: Tensor) -> Tensor:
        return self.lm_head(self.hidden(tokens_N))


def lora_net(dropout: float = 0.0) -> nn.Module:
    """A frozen net with LoRA (B away from zero) on the head and on the body."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["lm_head", "body"])
    net = get_peft_model(Net(), config).base_model.model
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


HEADS: dict[str, Callable[[], nn.Module]] = {
    "untied": Net,
    "tied": lambda: Net(tied=True),
    "bias": lambda: Net(bias=True),
    "frozen": lambda: Net(trainable=False),
    "lora": lora_net,
}


def batch(n: int = N, masked: str = "some", device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens_N = torch.randint(V, (n,), generator=generator)
    labels_N = torch.randint(V, (n,), generator=generator)
    if masked == "some":
        labels_N[torch.tensor([0, 3, 4, n - 1])] = -100
    elif masked == "all":
        labels_N[:] = -100
    return tokens_N.to(device), labels_N.to(device)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad and p.grad is not None}


def reference_loss(net: nn.Module, tokens_N: Tensor, labels_N: Tensor, num_items: float | None) -> Tensor:
    logits_NV = net(tokens_N)
    total = F.cross_entropy(
        logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), labels_N, reduction="sum"
    )
    return total / (num_items or max(int((labels_N != -100).sum()), 1))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error <= rtol, f"{name}: {error:.2e}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", ["none", "some"])
@pytest.mark.parametrize("head", HEADS)
def test_equals_full_cross_entropy_for_every_chunk_size(
    head: str, masked: str, dtype: torch.dtype, device: torch.device
) -> None:
    net = HEADS[head]().to(device, dtype)
    tokens_N, labels_N = batch(masked=masked, device=device)
    expected = reference_loss(net, tokens_N, labels_N, None)
    expected_gradients = gradients(net, expected)
    assert expected_gradients
    for chunk_rows in [None, *range(1, N + 4)]:
        loss = segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=chunk_rows)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
        rtol = 1e-5 if dtype == torch.float32 else 1e-13
        assert_same_gradients(gradients(net, loss), expected_gradients, rtol)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_divides_the_sum(as_tensor: bool, device: torch.device) -> None:
    net = Net(bias=True).to(device)
    tokens_N, labels_N = batch(device=device)
    expected = reference_loss(net, tokens_N, labels_N, 40.5)
    expected_gradients = gradients(net, expected)
    num_items = torch.tensor(40.5) if as_tensor else 40.5
    loss = segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, num_items=num_items, chunk_rows=4)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(net, loss), expected_gradients, 1e-5)


@pytest.mark.parametrize("num_items", [None, 0, 7, torch.tensor(0), torch.tensor(7)])
@pytest.mark.parametrize("head", HEADS)
def test_no_label_is_a_zero_that_keeps_the_graph(
    head: str, num_items: float | Tensor | None, device: torch.device
) -> None:
    net = HEADS[head]().to(device)
    tokens_N, labels_N = batch(masked="all", device=device)
    loss = segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, num_items=num_items)
    assert loss.item() == 0.0
    found = gradients(net, loss)
    assert found.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


def test_incoming_gradient_and_accumulation() -> None:
    """Two micro-batches with one divisor add up to the whole batch; a scaled loss scales the gradient."""
    net = Net(tied=True)
    tokens_N, labels_N = batch()
    items = int((labels_N != -100).sum())
    expected = gradients(net, 3 * reference_loss(net, tokens_N, labels_N, None))
    net.zero_grad()
    for part in (slice(0, 5), slice(5, N)):
        loss = segmented_cross_entropy(net.hidden(tokens_N[part]), net.lm_head, labels_N[part], num_items=items)
        (3 * loss).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-5)


def test_backward_writes_no_grad_itself() -> None:
    net = Net()
    tokens_N, labels_N = batch()
    hidden_ND = net.hidden(tokens_N)
    loss = segmented_cross_entropy(hidden_ND, net.lm_head, labels_N, chunk_rows=3)
    found = torch.autograd.grad(loss, [hidden_ND, net.lm_head.weight], retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    again = torch.autograd.grad(loss, [hidden_ND, net.lm_head.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_second_derivative_is_refused() -> None:
    net = Net()
    tokens_N, labels_N = batch()
    hidden_ND = net.hidden(tokens_N)
    loss = segmented_cross_entropy(hidden_ND, net.lm_head, labels_N)
    (gradient,) = torch.autograd.grad(loss**2, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_hidden_or_only_head_needs_a_gradient() -> None:
    net = Net(bias=True)
    tokens_N, labels_N = batch()
    hidden_ND = net.hidden(tokens_N).detach()
    expected = torch.autograd.grad(
        F.cross_entropy(net.lm_head(hidden_ND), labels_N), [net.lm_head.weight, net.lm_head.bias]
    )
    loss = segmented_cross_entropy(hidden_ND, net.lm_head, labels_N, chunk_rows=2)
    found = torch.autograd.grad(loss, [net.lm_head.weight, net.lm_head.bias])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    net.lm_head.requires_grad_(False)
    hidden_ND.requires_grad_()
    segmented_cross_entropy(hidden_ND, net.lm_head, labels_N, chunk_rows=2).backward()
    leaf_ND = hidden_ND.detach().requires_grad_()
    F.cross_entropy(net.lm_head(leaf_ND), labels_N).backward()
    torch.testing.assert_close(hidden_ND.grad, leaf_ND.grad, rtol=1e-5, atol=1e-7)


def test_without_gradients_only_the_loss_is_computed() -> None:
    net = Net()
    tokens_N, labels_N = batch()
    expected = reference_loss(net, tokens_N, labels_N, None)
    with torch.no_grad():
        loss = segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cached_under_no_grad", [False, True])
def test_head_runs_under_the_callers_autocast(cached_under_no_grad: bool, device: torch.device) -> None:
    """Whatever autocast has cached; error against fp32 at most full cross-entropy's own plus a rounding."""
    net = Net(bias=True).to(device)
    tokens_N, labels_N = batch(device=device)
    exact = gradients(net, reference_loss(net, tokens_N, labels_N, None))
    with torch.autocast(device.type, torch.bfloat16):
        expected = reference_loss(net, tokens_N, labels_N, None)
    plain = gradients(net, expected)
    seen = []
    net.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast(device.type, torch.bfloat16):
        hidden_ND = net.hidden(tokens_N)
        if cached_under_no_grad:
            with torch.no_grad():
                net.lm_head(hidden_ND)
        loss = segmented_cross_entropy(hidden_ND, net.lm_head, labels_N, chunk_rows=4)
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = gradients(net, loss)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        own_error = (plain[name] - truth).norm() / truth.norm()
        assert (found[name] - truth).norm() / truth.norm() <= own_error + 2**-9, name


def test_bfloat16_error_is_the_references_own(device: torch.device) -> None:
    """Error against fp64, per tensor, at most the full bf16 path's own plus one rounding of the result."""
    exact = Net(bias=True).double().to(device)
    net = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(200, D, generator=generator).to(device, torch.bfloat16)
    labels_N = torch.randint(V, (200,), generator=generator).to(device)

    def loss_and_gradients(head: nn.Module, dtype: torch.dtype, segmented: bool) -> list[Tensor]:
        leaf_ND = hidden_ND.to(dtype).requires_grad_()
        if segmented:
            loss = segmented_cross_entropy(leaf_ND, head, labels_N, chunk_rows=7)
        else:
            loss = F.cross_entropy(head(leaf_ND).to(torch.promote_types(dtype, torch.float32)), labels_N)
        return [loss, *torch.autograd.grad(loss, [leaf_ND, head.weight, head.bias])]

    truth = loss_and_gradients(exact.lm_head, torch.float64, False)
    plain = loss_and_gradients(net.lm_head, torch.bfloat16, False)
    ours = loss_and_gradients(net.lm_head, torch.bfloat16, True)
    for expected, reference, found in zip(truth, plain, ours, strict=True):
        own_error = (reference.double() - expected).norm() / expected.norm()
        assert (found.double() - expected).norm() / expected.norm() <= own_error + 2**-9


def test_lora_dropout_has_one_mask_for_loss_and_gradient() -> None:
    """One chunk under the same seed equals full cross-entropy with dropout active."""
    net = lora_net(dropout=0.5).train()
    tokens_N, labels_N = batch(masked="none")
    hidden_ND = net.embed(tokens_N)
    torch.manual_seed(3)
    expected_gradients = gradients(net, F.cross_entropy(net.lm_head(hidden_ND), labels_N))
    torch.manual_seed(3)
    loss = segmented_cross_entropy(hidden_ND.detach().requires_grad_(), net.lm_head, labels_N)
    assert_same_gradients(gradients(net, loss), expected_gradients, 1e-5)


@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_token_losses(masked: str) -> None:
    net = Net(bias=True)
    tokens_N, labels_N = batch(masked=masked)
    hidden_ND = net.hidden(tokens_N)
    expected_N = F.cross_entropy(net.lm_head(hidden_ND), labels_N, reduction="none").detach()
    for chunk_rows in [None, *range(1, N + 4)]:
        losses_N = token_losses(hidden_ND, net.lm_head, labels_N, chunk_rows=chunk_rows)
        assert losses_N.dtype == torch.float32
        assert not losses_N.requires_grad
        torch.testing.assert_close(losses_N, expected_N, rtol=1e-6, atol=1e-7)
        assert not losses_N[labels_N == -100].any()


def test_wrong_shapes_are_refused() -> None:
    net = Net()
    tokens_N, labels_N = batch()
    with pytest.raises(ValueError, match="flatten batch and tokens"):
        segmented_cross_entropy(net.hidden(tokens_N)[None], net.lm_head, labels_N[None])
    with pytest.raises(ValueError, match="align the labels"):
        token_losses(net.hidden(tokens_N), net.lm_head, labels_N[1:])
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=0)
