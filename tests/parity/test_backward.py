"""`backward` mode: gradients equal those of a dense forward whose branch gradients are cut by hooks (DESIGN 4.2)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from forward_reference import real_rows
from pairs import TINY_TILE_MIB, config, pair, step
from torch import Tensor, nn

import lemo
from reference import EnergyRule, assert_same_gradients, backward_reference, energy_rows, gradients
from tiny import BLOCK, CASES, FAMILIES, Batch, add_lora, build, make_batch

RULES: dict[str, dict[str, Any]] = {
    "half": {"fidelity": 0.4, "block_size": 2},
    "no-sink": {"fidelity": 0.2, "keep_sink": False},
    "uncompensated": {"fidelity": 0.4, "block_size": 2, "compensate": False},
    "most-kept": {"fidelity": 0.8, "block_size": 1, "kv_grad": "kept"},
    "capped": {"fidelity": 0.95, "keep": 0.5},
    "ranked": {"fidelity": 0.7, "keep": 0.6, "labelled": "ranked"},
}
# the choice of blocks doesn't depend on the architecture: every rule on three, both kinds of K/V gradient on all
RULE_CASES = [
    (f, n, r)
    for f, n in CASES
    for r in RULES
    if r in ("half", "uncompensated", "most-kept") or f in ("llama", "opt", "opt-350m")
]


def hook_reference(model: nn.Module, batch: Batch, rule: dict[str, Any], **call: Any) -> tuple[Tensor, list[set[int]]]:
    """The reference for one rule; gradients stay in `.grad`."""
    known = ("fidelity", "keep", "labelled", "block_size", "keep_sink")
    energy = EnergyRule(**{k: v for k, v in rule.items() if k in known})
    return backward_reference(
        model,
        batch,
        lambda i, g: energy_rows(g, batch, energy),
        kv_grad=rule.get("kv_grad", "all"),
        compensate=rule.get("compensate", True),
        **call,
    )


def left_out(batch: Batch, rows: list[set[int]]) -> bool:
    """Whether the reference left anything out in every layer: otherwise the comparison shows nothing."""
    return all(layer < real_rows(batch) for layer in rows)


@pytest.mark.parametrize(("family", "name", "rule"), RULE_CASES)
def test_gradients_equal_hooked_dense(family: str, name: str, rule: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(**RULES[rule], tile_mib=TINY_TILE_MIB))
    batch = make_batch(name, device, label_all=rule == "ranked")
    want_loss, rows = hook_reference(dense, batch, RULES[rule])
    assert left_out(batch, rows)
    loss, got = step(sparse, batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))


@pytest.mark.parametrize("rule", ["half", "uncompensated", "most-kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_trained(family: str, rule: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(**RULES[rule]), lora=False)
    batch = make_batch("left", device)
    _, rows = hook_reference(dense, batch, RULES[rule])
    assert left_out(batch, rows)
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


@pytest.mark.parametrize("family", ["llama", "mistral", "opt-350m"])
def test_eager_attention(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.6), attention="eager")
    batch = make_batch("right", device)
    hook_reference(dense, batch, {"fidelity": 0.6})
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_extended_context(family: str, rope_type: str, device: torch.device) -> None:
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4}
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = 32
    rule = {"fidelity": 0.6, "kv_grad": "kept"}
    dense, sparse = pair(family, device, config(**rule), rope_parameters=rope)
    batch = make_batch("left", device)
    _, rows = hook_reference(dense, batch, rule)
    assert left_out(batch, rows)
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, reentrant: bool, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.6))
    batch = make_batch("right", device)
    hook_reference(dense, batch, {"fidelity": 0.6})
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        sparse.enable_input_require_grads()
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_normalises_over_all_micro_batches(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.6))
    batches = [
        make_batch("right", device),
        make_batch("plain", device, seed=5),
        make_batch("packed", device, seed=6),
    ]
    items = sum(batch.label_count() for batch in batches)
    for number in (items, torch.tensor(items, device=device)):
        for batch in batches:
            want, _ = hook_reference(dense, batch, {"fidelity": 0.6}, num_items_in_batch=number)
            loss = sparse(**batch.inputs(), num_items_in_batch=number).loss
            loss.backward()
            torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
        assert_same_gradients(gradients(sparse), gradients(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_added_after_sparsify(family: str, device: torch.device) -> None:
    rule = {"fidelity": 0.6}
    plain = build(family, device, lora=False)
    sparse = add_lora(lemo.sparsify(copy.deepcopy(plain), config(**rule))).train()
    dense = add_lora(plain).train()
    batch = make_batch("left", device)
    hook_reference(dense, batch, rule)
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))
    assert lemo.models.get_runtime(sparse) is not None


@pytest.mark.parametrize("block_size", [1, 5, 43, 64])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    rule = {"fidelity": 0.8, "block_size": block_size}
    dense, sparse = pair("qwen2", device, config(**rule))
    batch = make_batch("plain", device)
    hook_reference(dense, batch, rule)
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


def test_gradients_accumulate_and_do_not_depend_on_the_step(device: torch.device) -> None:
    _, sparse = pair("llama", device, config(fidelity=0.6))
    batch = make_batch("right", device)
    _, first = step(sparse, batch)
    for _ in range(2):
        sparse(**batch.inputs()).loss.backward()
    assert_same_gradients(gradients(sparse), {name: 2 * g for name, g in first.items()}, rel=1e-6)


def test_two_forwards_before_two_backwards(device: torch.device) -> None:
    """Each forward's backward must use its own layout and plans, not those of the latest call."""
    dense, sparse = pair("qwen3", device, config(fidelity=0.6))
    batches = [make_batch("right", device), make_batch("packed2", device)]
    for batch in batches:
        hook_reference(dense, batch, {"fidelity": 0.6})
    losses = [sparse(**batch.inputs()).loss for batch in batches]
    for loss in losses:
        loss.backward()
    assert_same_gradients(gradients(sparse), gradients(dense))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_labelled_blocks_over_the_cap_are_an_error(family: str, device: torch.device) -> None:
    _, sparse = pair(family, device, config(keep=0.5))
    batch = make_batch("plain", device, label_all=True)
    with pytest.raises(ValueError, match="segments"):
        sparse(**batch.inputs()).loss.backward()


@pytest.mark.parametrize("name", ["plain", "right"])
def test_statistics_are_those_of_the_plans(name: str, device: torch.device) -> None:
    rule = {"fidelity": 0.6}
    dense, sparse = pair("llama", device, config(**rule))
    batch = make_batch(name, device)
    _, rows = hook_reference(dense, batch, rule)
    step(sparse, batch)
    stats = lemo.models.get_runtime(sparse).collect()
    assert len(stats.keep) == len(stats.fidelity) == 3
    for layer, kept in enumerate(rows):
        share = len(kept) / len(real_rows(batch))
        assert stats.keep[layer] == pytest.approx((share, share))
        assert 0.6 <= stats.fidelity[layer] <= 1.0
    step(sparse, batch)
    step(sparse, batch)
    again = lemo.models.get_runtime(sparse).collect()
    assert again.keep_mean == pytest.approx(stats.keep_mean)


def _flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].double().flatten() for name in sorted(named)])


@pytest.mark.parametrize("name", ["plain", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str, name: str, device: torch.device) -> None:
    """Error to fp32 no larger than twice that of the hooked model under the same autocast. With keep 0.25 exactly
    the labelled blocks fit, so that rounding can't change the plan."""
    rule = {"keep": 0.25}
    dense, sparse = pair(family, device, config(**rule))
    batch = make_batch(name, device)
    hook_reference(dense, batch, rule)
    exact = _flat(gradients(dense))

    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = sparse(**batch.inputs())
    output.loss.backward()
    mine = gradients(sparse)

    low_loss, _ = _autocast_reference(dense, batch, rule, device)
    theirs = _flat(gradients(dense))
    torch.testing.assert_close(output.loss.detach().float(), low_loss.float(), rtol=2e-2, atol=0)
    assert all(torch.isfinite(g).all() for g in mine.values())
    own_error = (theirs - exact).norm()
    assert own_error > 0, "autocast changed nothing: the comparison shows nothing"
    assert (_flat(mine) - exact).norm() <= 2 * own_error


def _autocast_reference(
    dense: nn.Module, batch: Batch, rule: dict[str, Any], device: torch.device
) -> tuple[Tensor, list[set[int]]]:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return hook_reference(dense, batch, rule)


def test_rule_uses_the_test_block_size() -> None:
    assert EnergyRule().block_size == BLOCK == config().block_size
