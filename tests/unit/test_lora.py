"""LoRA's product fused with its linear: equal to PEFT's own, only where it is plain LoRA in half precision."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lemo.models import lora
from lemo.models.frozen import is_frozen
from lemo.models.fused import fused as fused_modules
from lemo.sparse.low_copies import copied, in_dtype
from lemo.sparse.low_rank import Added, add_low_rank


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40, bias=bias), nn.Linear(40, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def adapted(bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 10, "target_modules": ["up", "down"], "init_lora_weights": False}
    return get_peft_model(Two(bias), LoraConfig(**(values | options))).base_model.model


def linears(model: Any) -> list[nn.Module]:
    return [model.up, model.down]


def run(model: Any, x: Tensor, fused: bool, dtype: torch.dtype | None) -> list[Tensor]:
    """Output, gradient of x, and of every parameter that has one."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if fused:
            with fused_modules(linears(model), ()):
                out = model(leaf)
        else:
            out = model(leaf)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), leaf.grad, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls = []

    def noted(*arguments: Any) -> tuple[Tensor, ...]:
        calls.append(tuple(arguments[0].shape))
        return add_low_rank(*arguments)

    monkeypatch.setattr(lora, "add_low_rank", noted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
def test_no_further_from_fp32_than_pefts_own(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(bias), torch.randn(2000, 24)
    exact = run(model, x, False, None)
    own = run(model, x, False, torch.bfloat16)
    calls = spy(monkeypatch)
    fused = run(model, x, True, torch.bfloat16)
    assert calls == [(2000, 24), (2000, 40)]
    assert len(exact) == len(own) == len(fused) == 6
    ratios = []
    for right, low, found in zip(exact, own, fused, strict=True):
        assert (found.shape, found.dtype) == (low.shape, low.dtype)
        ratios.append(float((found - right).norm() / (low - right).norm()))
    # Output and gradient of x have many numbers; a parameter's gradient is a sum, so its error is one draw of noise.
    assert 0 < max(ratios[:2]) <= 1, ratios
    assert max(ratios[2:]) <= 1.6, ratios
    assert sum(ratios[2:]) / 4 <= 1.15, ratios


def test_exact_in_fp64() -> None:
    y, x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (5, 6), (3, 6), (7, 3)))
    wanted = torch.autograd.grad((y * 1 + 0.5 * (x @ a.T) @ b.T).square().sum(), (y, x, a, b))
    found = torch.autograd.grad(add_low_rank(x, Added(y * 1, a, b, 0.5))[0].square().sum(), (y, x, a, b))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda y, x, a, b: add_low_rank(x, Added(y * 1, a, b, 0.5)), (y, x, a, b))


@pytest.mark.parametrize("frozen", [(), ("x",), ("a",), ("b",), ("x", "a", "b")])
def test_linears_of_one_input_are_exact_in_fp64(frozen: tuple[str, ...]) -> None:
    """Of different widths, ranks and scales; of the last the linear's own gradient is made too."""
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad="x" not in frozen)
    sizes = ((7, 3, 0.5), (4, 2, 2.0), (9, 5, 1.0))

    def drawn(rows: int, columns: int, name: str) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float64, requires_grad=name not in frozen)

    parts = [(drawn(5, o, "y"), drawn(r, 6, "a"), drawn(o, r, "b"), s) for o, r, s in sizes]
    leaves = [t for t in (x, *(t for part in parts for t in part[:3])) if t.requires_grad]
    weight = torch.randn(9, 6, dtype=torch.float64)
    wanted = [y + s * (x @ a.T) @ b.T for y, a, b, s in parts]
    wanted[-1] = wanted[-1] - parts[-1][0] + x @ weight.T
    added = [Added(y * 1, a, b, s) for y, a, b, s in parts[:-1]]
    added.append(Added((x @ weight.T).detach(), *parts[-1][1:], weight))
    leaves = [t for t in leaves if t is not parts[-1][0]]
    found = add_low_rank(x, *added)
    right, mine = (torch.autograd.grad(sum(t.square().sum() for t in ts), leaves) for ts in (wanted, found))
    for left, other in zip((*found, *mine), (*wanted, *right), strict=True):
        torch.testing.assert_close(left, other, rtol=1e-12, atol=1e-12)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.plain = nn.Linear(24, 40), nn.Linear(24, 16, bias=False), nn.Linear(24, 8)


def test_linears_of_one_input_go_together_unless_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = LoraConfig(r=4, lora_alpha=10, target_modules=["up", "down"], init_lora_weights=False)
    model: Any = get_peft_model(Three(), options).base_model.model
    modules, x = [model.up, model.plain, model.down], torch.randn(2000, 24)
    sizes: list[int] = []
    monkeypatch.setattr(lora, "add_low_rank", lambda x, *added: sizes.append(len(added)) or add_low_rank(x, *added))

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with (
            torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
            fused_modules(modules, ()),
        ):
            out = lora.linears_of_one_input(modules, leaf)
        sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in out).backward()
        return [*out, leaf.grad, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    exact, together = run(None), run(torch.bfloat16)
    assert sizes == [2]
    seen: list[int] = []
    with model.up.register_forward_hook(lambda *_: seen.append(1)):
        apart = run(torch.bfloat16)
    assert (sizes, seen) == ([2, 1, 1], [1])
    for right, low, found in zip(exact, apart, together, strict=True):
        assert (found.shape, found.dtype) == (low.shape, low.dtype)
        assert 0 < (found - right).norm() <= 1.05 * (low - right).norm()


def test_half_precision_weights_without_autocast_and_batches_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted().to(torch.bfloat16), torch.randn(2, 9, 24).to(torch.bfloat16)
    calls = spy(monkeypatch)
    with torch.no_grad():
        own = model(x)
        with fused_modules(linears(model), ()):
            found = model(x)
    assert calls == [(18, 24), (18, 40)]
    assert found.shape == own.shape
    torch.testing.assert_close(found, own, rtol=2e-2, atol=2e-2)
    # With gradients a batch goes PEFT's way.
    with fused_modules(linears(model), ()):
        assert model(x).requires_grad
    assert len(calls) == 2


def test_fp32_is_bitwise_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(9, 24)
    calls = spy(monkeypatch)
    for left, right in zip(run(model, x, True, None), run(model, x, False, None), strict=True):
        assert torch.equal(left, right)
    assert not calls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "a variant of LoRA (DoraLinearVariant)"),
        ({"lora_dropout": 0.5}, "LoRA dropout"),
        ({"lora_bias": True}, "LoRA matrices with a bias, or that aren't linears"),
    ],
)
def test_other_adapters_run_pefts_code_and_the_log_says_so(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lora._note.cache_clear()
    model, x = adapted(**options), torch.randn(9, 24)
    calls = spy(monkeypatch)
    with caplog.at_level(logging.INFO, "lemo"):
        for _ in range(2):
            run(model, x, True, torch.bfloat16)
    assert not calls
    assert [record.getMessage() for record in caplog.records] == [f"LoRA's product isn't fused with its linear: {said}"]


def test_an_adapter_switched_off_or_merged_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(9, 24)
    calls = spy(monkeypatch)
    for change in ("off", "merged"):
        for layer in linears(model):
            layer.enable_adapters(change != "off")
            if change == "merged":
                layer.merge()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            own = model(x)
            with fused_modules(linears(model), ()):
                assert torch.equal(model(x), own)
    assert not calls


def test_dropout_that_is_off_and_two_active_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(lora_dropout=0.5).eval(), torch.randn(9, 24)
    for layer in linears(model):
        layer.update_layer("second", 2, lora_alpha=3, config=LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
        layer.set_adapter(["default", "second"])
    calls = spy(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = model(x)
        with fused_modules(linears(model), ()):
            found = model(x)
    assert len(calls) == 4
    torch.testing.assert_close(found, own, rtol=3e-2, atol=3e-2)


def test_layers_are_left_as_they_were() -> None:
    model = adapted()
    model.up.forward = theirs = model.up.forward  # a wrapper's, accelerate's for one
    with pytest.raises(RuntimeError, match="shapes"), fused_modules(linears(model), ()):
        model(torch.randn(3, 5))
    assert model.up.__dict__["forward"] is theirs
    assert "forward" not in model.down.__dict__


@pytest.mark.parametrize("case", ["frozen", "trained", "trained bias", "watched", "replaced", "all watched"])
def test_a_linear_that_trains_or_is_watched_keeps_its_graph(
    case: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In bf16 all through: gradients of x, adapter and linear are PEFT's but for rounding."""
    model, x = adapted().to(torch.bfloat16), torch.randn(500, 24).to(torch.bfloat16)
    base, seen = model.up.base_layer, []
    base.weight.requires_grad_(case == "trained")
    base.bias.requires_grad_(case == "trained bias")
    if case == "watched":
        base.register_full_backward_hook(lambda *_: seen.append(1))
    if case == "replaced":
        base.forward = base.forward
    wanted = run(model, x, False, None)
    seen.clear()
    weights: list[Any] = []
    if case == "all watched":
        handle = register_module_forward_hook(lambda module, *_: seen.extend([1] * (module is base)))
        request.addfinalizer(handle.remove)
    monkeypatch.setattr(lora, "add_low_rank", lambda x, one: weights.append(one.weight) or add_low_rank(x, one))
    found = run(model, x, True, None)
    up, down = base.weight, model.down.base_layer.weight
    # Of a watched linear nothing is fused.
    wanted_weights = {"frozen": [up, down], "watched": [down], "all watched": []}.get(case, [None, down])
    assert len(weights) == len(wanted_weights)
    assert all(one is other for one, other in zip(weights, wanted_weights, strict=True))
    assert len(seen) == (case in ("watched", "all watched"))
    assert len(found) == len(wanted)
    for left, right in zip(found, wanted, strict=True):
        assert (left - right).norm() <= 2e-2 * right.norm()


def test_matrices_are_cast_once_for_a_pass_and_not_found_after_it() -> None:
    model, cpu = adapted(), torch.device("cpu")
    other = adapted(r=3).up
    groups = [lora.matrices_of([model.up, other], cpu), lora.matrices_of([model.down], cpu)]
    for number in range(2):
        with copied(groups, torch.bfloat16):
            found = [in_dtype(*group, torch.bfloat16) for group in groups]
            again = [in_dtype(*group, torch.bfloat16) for group in groups]
            assert in_dtype(*groups[1], torch.float16)[0].dtype == torch.float16
        for (a, b), (low_a, low_b), (same, _) in zip(groups, found, again, strict=True):
            assert low_a is same
            assert torch.equal(low_a, torch.cat(a).to(torch.bfloat16))
            assert [torch.equal(low, x.to(torch.bfloat16)) for low, x in zip(low_b, b, strict=True)] == [True] * len(b)
            assert in_dtype(a, b, torch.bfloat16)[0] is not low_a
        model.up.lora_A["default"].weight.data.add_(number + 1.0)


def test_matrices_that_are_not_whole_are_left_to_their_linear() -> None:
    model = adapted()
    model.up.lora_B["default"].weight.data = torch.empty(0)  # as FSDP and ZeRO leave it between layers
    cpu = torch.device("cpu")
    assert [len(x) for x in lora.matrices_of(linears(model), cpu)] == [1, 1]
    assert lora.matrices_of(linears(model), torch.device("meta")) == ([], [])


class Posing(Tensor):
    """As quantised weights do: a tensor with the dtype it stands for and products of its own."""


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_loras_parts_are_heard(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heard = adapted(lora_dropout=0.5 if part == "lora_dropout" else 0.0).eval(), []
    getattr(model.up, part)["default"].register_forward_hook(lambda *_: heard.append(part))
    calls = spy(monkeypatch)
    run(model, torch.randn(8, 24), True, torch.bfloat16)
    assert (len(heard), calls) == (1, [(8, 40)])


def test_a_linear_whose_weight_only_poses_as_a_matrix_runs_itself() -> None:
    linear, x = nn.Linear(24, 40).bfloat16().requires_grad_(False), torch.randn(8, 24).bfloat16()
    assert is_frozen(linear, x)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Posing), requires_grad=False)
    assert not is_frozen(linear, x)
