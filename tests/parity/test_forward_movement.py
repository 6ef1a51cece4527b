"""`forward` mode by the movement kernels: the masked-dense reference, what is stored, and what is left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pairs import config, pair, step
from test_bypass import inputs_of
from test_forward import compare
from torch import Tensor, nn

import lemo
from lemo.kernels import reference
from lemo.models import fit_bypasses
from lemo.sparse import forward
from lemo.sparse import movement as functions
from reference import hooks
from tiny import CASES, layers_of, make_batch

pytest.importorskip("triton")
from lemo.kernels import movement as kernels


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Movement is done by the kernels, on a CPU in Triton's interpreter; counts their calls."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        run = getattr(kernels, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # Without rows it is the backward that wants the norm again.
            calls["norm again" if name == "gather_norm" and args[1] is None else name] += 1
            return run(*args, **kwargs)

        return call

    for module in (forward, functions):
        monkeypatch.setattr(module, "movement_backend", lambda *_: "triton")
    for name in ("gather_rows", "gather_norm", "add_rows_", "add_norm_gradient_"):
        monkeypatch.setattr(kernels, name, counted(name))
        monkeypatch.setattr(reference, name, None)
    return calls


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in CASES if n in ("left", "packed")])
def test_equals_masked_dense(family: str, name: str, by_kernels: Counter[str], device: torch.device) -> None:
    keeps: dict[str, Any] = {"attention": {"keep": (1.0, 0.4, 0.7)}, "mlp": {"keep": (0.3, 1.0, 0.5)}}
    dense, sparse = pair(family, device, config(mode="forward", **keeps))
    compare(dense, sparse, make_batch(name, device))
    # Two branches of layer 2, one each of 0 and 1; norms on the residual path aren't the branches'.
    assert by_kernels["add_rows_"] >= 4
    assert by_kernels["gather_norm"] == (0 if family == "opt-350m" else 4)
    assert by_kernels["add_norm_gradient_"] == by_kernels["norm again"] == by_kernels["gather_norm"]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_norms_train_and_bypasses_fill_in(family: str, by_kernels: Counter[str], device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5), lora=False)
    batch = make_batch("right", device, label_all=True)
    compare(dense, sparse, batch)
    before = by_kernels["gather_norm"]
    fit_bypasses(sparse, [inputs_of(batch)], rank=5)
    step(sparse, batch)
    assert by_kernels["gather_norm"] == before + 12


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, by_kernels: Counter[str], device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.5))
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        sparse.enable_input_require_grads()
    compare(dense, sparse, make_batch("right", device))
    assert by_kernels["gather_norm"] == 12
    assert by_kernels["norm again"] == 0


def test_a_watched_norm_is_called_as_a_module(by_kernels: Counter[str], device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.5))
    seen: list[int] = []
    norm = layers_of(sparse)[1].input_layernorm
    with hooks([norm.register_forward_hook(lambda m, a, out: seen.append(out.shape[-2]))]):
        compare(dense, sparse, make_batch("plain", device))
    # All rows for the scores, the kept rows for the branch.
    assert seen == [43, 19]
    assert by_kernels["gather_norm"] == 5


def held(model: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """One tensor for each storage that a forward of the decoder stores for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, Tensor] = {}

    def note(x: Any) -> Any:
        tensors = (
            [x] if isinstance(x, Tensor) else [*x._again.args, *getattr(x._again.args[1], "__dict__", {}).values()]
        )
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                stored.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return x

    hooks_of_torch = torch.autograd.graph.saved_tensors_hooks
    # Inner hooks hide from outer ones what they pack.
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.autograd.graph,
            "saved_tensors_hooks",
            lambda pack, unpack: hooks_of_torch(lambda x: note(pack(x)), unpack),
        )
        with hooks_of_torch(note, lambda x: x):
            model.get_decoder()(**batch.inputs(labels=False))
    return [tensor for memory, tensor in stored.items() if memory not in parameters]


@pytest.mark.parametrize("by_kernel", [True, False])
def test_nothing_of_every_row_is_stored(
    by_kernel: bool, device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_kernel:
        request.getfixturevalue("by_kernels")
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.25, block_size=2))
    batch = make_batch("plain", device)
    rows, width = batch.rows, 32

    def whole(model: nn.Module) -> int:
        return sum(x.untyped_storage().nbytes() >= 4 * rows * width for x in held(model, batch, monkeypatch))

    assert whole(dense) >= 3 * 4
    # What the model's last norm saves.
    assert whole(sparse) == 1


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_what_is_stored_is_what_the_count_says(
    keep: float, by_kernels: Counter[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kept row: both branches' inputs before their norms, q, k, v, attention's output, gate and up."""
    if device.type != "cpu":
        pytest.skip("torch's attention in fp32 with grouped heads stores more on a GPU")
    dense, sparse = pair("llama", device, config(mode="forward", keep=keep, block_size=1))
    batch = make_batch("plain", device)
    # Besides what goes into seven LoRA products (rank 4), the rotation's numbers, and attention's denominators.
    count = 2 * 32 + (32 + 16 + 16 + 32) + 2 * 56 + 7 * 4 + 2 * 8 + 4
    # The model's last norm saves all rows, and a number for each.
    stored = sum(x.untyped_storage().nbytes() for x in held(sparse, batch, monkeypatch)) - 4 * batch.rows * (32 + 1)
    runtime = lemo.models.get_runtime(sparse)
    assert runtime is not None
    kept = sum(len(plan.rows) for (_, branch), plan in runtime.last_plans.items() if branch == "mlp")
    assert stored == 4 * kept * count
    everything = sum(x.untyped_storage().nbytes() for x in held(dense, batch, monkeypatch))
    assert everything > 2.5 * stored / keep / 2


def test_inputs_outputs_and_gradients_of_others_are_left_alone(by_kernels: Counter[str], device: torch.device) -> None:
    """A layer's input may be asked for as a hidden state, and the gradient of its output may be anybody's."""
    _, sparse = pair("llama", device, config(mode="forward", keep=0.5))
    batch = make_batch("plain", device)
    sparse(**batch.inputs())
    entered: list[tuple[Tensor, Tensor]] = []
    left: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        entered.append((args[0], args[0].detach().clone()))
        left.append((out, out.detach().clone()))

    with hooks([layer.register_forward_hook(note) for layer in layers_of(sparse)]):
        states = sparse.get_decoder()(**batch.inputs(labels=False), output_hidden_states=True).hidden_states
    for now, then in (*entered, *left):
        assert torch.equal(now, then)
    for state, (_, then) in zip(states, entered, strict=False):
        assert torch.equal(state, then)
    grad = torch.randn_like(left[-1][0])
    before = grad.clone()
    inputs = [entered[0][0]] if entered[0][0].requires_grad else []
    parameters = [p for p in sparse.parameters() if p.requires_grad]
    first = torch.autograd.grad(left[-1][0], [*inputs, *parameters], grad, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(left[-1][0], [*inputs, *parameters], grad, allow_unused=True)
    assert torch.equal(grad, before)
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
