"""What the runtime does on the `attend` axis: draws, densities, lists shared or let go, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attend_reference import reported
from pairs import attends, config, pair, step
from test_random import SEED, runtime_of

import lemo
from lemo.config import Attend, SparsityConfig
from lemo.models import attend, get_runtime, surgery
from reference import assert_same_gradients, gradients
from tiny import build, make_batch


@pytest.mark.parametrize("mode", ["dense", "backward", "forward"])
def test_a_step_leaves_other_attention_alone(mode: str, device: torch.device) -> None:
    rest = {"keep": 0.6} if mode == "forward" else {}
    _, sparse = pair("llama", device, config(mode=mode, attend=attends("half"), **rest), attention="eager")
    step(sparse, make_batch("packed", device))
    assert sparse.config._attn_implementation == "eager"


@pytest.mark.parametrize("which", ["random", "sampled"])
def test_draws_differ_by_layer_head_and_step_and_follow_the_state(which: str, device: torch.device) -> None:
    _, sparse = pair("llama", device, config(mode="dense", attend=attends(which)))
    batch = make_batch("plain", device)

    def lists() -> list[Any]:
        step(sparse, batch)
        return [head for layer in range(3) for head in reported(sparse, batch, layer)[0]]

    torch.manual_seed(SEED)
    first = lists()
    assert len({str(head) for head in first}) == 6
    state = torch.get_rng_state()
    second = lists()
    assert second != first
    torch.set_rng_state(state)
    assert lists() == second


@pytest.mark.parametrize("mode", ["dense", "backward", "forward"])
def test_the_choice_sees_the_dtype_that_attention_computes_in(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated queries are fp32 under autocast, of twice the bytes that the kernels may have."""
    seen, real = set(), attend.choose_blocks

    def watched(grid: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        seen.update({q.dtype, k.dtype})
        return real(grid, q, k, *rest)

    monkeypatch.setattr(attend, "choose_blocks", watched)
    rest = {"keep": 0.6} if mode == "forward" else {}
    _, sparse = pair("llama", device, config(mode=mode, attend=attends("sampled"), **rest))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        sparse(**make_batch("plain", device).inputs())
    assert seen == {torch.bfloat16}


def test_what_cant_be_combined_is_an_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"attend\.block .48. must divide block_size .64."):
        SparsityConfig(mode="forward", keep=0.5, attend=Attend(block=48))
    with pytest.raises(ValueError, match="give window, and choice none"):
        Attend(density=None, choice="pooled", window=128)
    with pytest.raises(ValueError, match="give window, and choice none"):
        Attend(density=None, choice="none")
    with pytest.raises(ValueError, match="attention_dropout"):
        lemo.sparsify(build("llama", device, attention_dropout=0.1), config(mode="dense", attend=Attend()))
    sparse = lemo.sparsify(build("llama", device), config(mode="dense", attend=attends("labelled")))
    batch = make_batch("plain", device)
    with pytest.raises(ValueError, match="must see the labels"):
        sparse(**batch.inputs(labels=False))


@pytest.mark.parametrize(
    "values", [{"mode": "forward", "keep": 1.0}, {"mode": "dense"}, {"mode": "backward", "fidelity": 1.0}]
)
def test_dense_passes_count_in_the_density(values: dict[str, Any], device: torch.device) -> None:
    settings = config(**values, dense_share=0.5, attend=Attend(density=0.4, block=2))
    dense, sparse = pair("llama", device, settings)
    batch = make_batch("plain", device)
    dense_loss = dense.train()(**batch.inputs()).loss
    dense_loss.backward()
    runtime = get_runtime(sparse)
    assert runtime is not None
    found: list[Any] = []
    torch.manual_seed(SEED)
    while len(set(found)) < 2:
        loss, got = step(sparse, batch)
        found.append(runtime.collect().density)
        if found[-1] == 1.0:
            torch.testing.assert_close(loss, dense_loss.detach(), rtol=1e-6, atol=0)
            assert_same_gradients(got, gradients(dense))
        sparse.zero_grad()
    torch.manual_seed(SEED)
    for _ in found:
        step(sparse, batch)
    assert runtime.collect().density == pytest.approx(sum(found) / len(found))
    assert 1.0 in found
    assert min(found) < 0.9


def test_dense_passes_count_once_in_the_keep(device: torch.device) -> None:
    settings = config(fidelity=1.0, keep=0.25, labelled="ranked", dense_share=0.5, attend=Attend(density=0.4, block=2))
    _, sparse = pair("llama", device, settings)
    runtime, keeps = runtime_of(sparse), set()
    torch.manual_seed(SEED)
    passes = 0
    while len(keeps) < 2:
        step(sparse, make_batch("plain", device))
        keeps.add(runtime.collect().keep[1][0])
        passes += 1
    assert min(keeps) < max(keeps) == 1.0
    torch.manual_seed(SEED)
    for _ in range(passes):
        step(sparse, make_batch("plain", device))
    # All but the last are of one kind.
    shares = [(first * (passes - 1) + last) / passes for first, last in itertools.permutations(keeps)]
    assert runtime.collect().keep[1][0] in [pytest.approx(share) for share in shares]


def test_each_layer_has_its_density(device: torch.device) -> None:
    densities = (0.3, 1.0, 0.6)
    _, sparse = pair("llama", device, config(mode="dense", attend=Attend(density=densities, block=2)))
    batch = make_batch("plain", device)
    step(sparse, batch)
    together = runtime_of(sparse).collect().density
    alone = []
    for density in densities:
        _, uniform = pair("llama", device, config(mode="dense", attend=Attend(density=density, block=2)))
        step(uniform, batch)
        alone.append(runtime_of(uniform).collect().density)
    assert alone[0] < alone[2] < alone[1] == 1.0
    assert together == pytest.approx(sum(alone) / 3)
    with pytest.raises(ValueError, match=r"attend\.density has 2 numbers and the model 3 layers"):
        lemo.sparsify(build("llama", device), config(mode="dense", attend=Attend(density=(0.5, 0.5))))


def test_no_layers_lists_are_held_after_a_step(device: torch.device) -> None:
    """Unless tests ask: of each layer where blocks lay is noted, without what was made of it on the device."""
    model = lemo.sparsify(build("llama", device), config(mode="dense", attend=attends("random")))
    step(model, make_batch("plain", device))
    runtime = runtime_of(model)
    assert runtime.last_lists == {}
    assert list(runtime.last_grids) == [0, 1, 2]
    assert all("here" not in vars(grid.grid) for grid in runtime.last_grids.values())
    assert all("nearest_lists" not in vars(grid) for grid in runtime.last_grids.values())


def test_layers_that_keep_everything_share_their_lists_in_forward_mode(device: torch.device) -> None:
    settings = config(mode="forward", attention={"keep": (1.0, 0.6, 1.0)}, attend=attends("none"))
    _, sparse = pair("llama", device, settings)
    step(sparse, make_batch("plain", device))
    lists = runtime_of(sparse).last_lists
    assert lists[0] is lists[2]
    assert lists[0] is not lists[1]


def test_blocks_that_the_kernels_refuse_are_an_error_before_a_gpu_works(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = build("llama", device)
    monkeypatch.setattr(surgery, "_device_of", lambda layer: torch.device("cuda"))
    with pytest.raises(ValueError, match=r"not 48. Change sparsity\.attend\.block"):
        lemo.sparsify(model, config(mode="dense", attend=Attend(block=48)))
    assert get_runtime(model) is None
