"""`forward` mode: equals a masked-dense reference, and its plans those of plain scores (DESIGN 4.2, 4.3, 4.6)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forward_reference import (
    ForwardRun,
    expected_rows,
    layer_scores,
    masked_dense,
    real_rows,
)
from pairs import config, pair, rows_of_plans, step
from torch import nn

import lemo
from lemo.models import get_runtime
from reference import assert_same_gradients, assert_same_hidden, gradients, hooks, record_layers
from tiny import BLOCK, CASES, FAMILIES, Batch, make_batch

BRANCHES = ("attention", "mlp")
KEEPS: dict[str, dict[str, Any]] = {
    "both": {"keep": 0.5},
    "attention": {"attention": {"keep": (1.0, 0.4, 0.7)}},
    "mlp": {"mlp": {"keep": 0.35}},
    "unequal": {"attention": {"keep": 0.6}, "mlp": {"keep": (0.3, 0.6, 0.5)}},
}


def _keep_of(values: dict[str, Any], branch: str, layer: int) -> float:
    keep = values.get("keep", values.get(branch, {}).get("keep", 1.0))
    return keep[layer] if isinstance(keep, tuple) else keep


def compare(dense: nn.Module, sparse: nn.Module, batch: Batch) -> tuple[ForwardRun, dict[tuple[int, str], set[int]]]:
    """Outputs, loss and all gradients against the masked-dense run of the plans that lemo reports."""
    outputs: list[torch.Tensor] = []
    with hooks(record_layers(sparse, outputs)):
        loss, got = step(sparse, batch)
    plans = rows_of_plans(sparse)
    want = masked_dense(dense, batch, plans)
    want.loss.backward()
    real = batch.real_mask()
    for mine, theirs in zip(outputs, want.outputs, strict=True):
        assert_same_hidden(mine[real], theirs[real])
    torch.testing.assert_close(loss, want.loss.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))
    return want, plans


KEEP_CASES = [(f, n, k) for f, n in CASES for k in KEEPS if k in ("both", "unequal") or f in ("llama", "opt")]


@pytest.mark.parametrize(("family", "name", "keep"), KEEP_CASES)
def test_keep(family: str, name: str, keep: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", **KEEPS[keep]))
    batch = make_batch(name, device)
    run, plans = compare(dense, sparse, batch)
    everything = real_rows(batch)
    for layer in range(3):
        for branch in BRANCHES:
            share = _keep_of(KEEPS[keep], branch, layer)
            scores = layer_scores(run, dense, batch, branch, layer, BLOCK, "paper")
            want = expected_rows(scores, batch, BLOCK, keep=share)
            assert plans.get((layer, branch), everything) == want, (layer, branch)
            assert (want < everything) == (share < 1.0)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", ["plain", "left", "packed"])
def test_keep_asks_for_no_rows_on_the_host(family: str, name: str, device: torch.device) -> None:
    """They would be a wait for the device in every layer."""
    _, sparse = pair(family, device, config(mode="forward", keep=0.5))
    step(sparse, make_batch(name, device))
    runtime = get_runtime(sparse)
    assert runtime is not None
    assert len(runtime.last_plans) == 6
    for plan in runtime.last_plans.values():
        assert plan.known_rows is None
        assert "host_rows" not in vars(plan)


def middle_thresholds(dense: nn.Module, batch: Batch, branch: str, score: str) -> tuple[float, ...]:
    """Per layer a number that about half of the dense model's block scores exceed, far from any of them."""
    with torch.no_grad():
        run = masked_dense(dense, batch, {})
    found = []
    for layer in range(3):
        scores = layer_scores(run, dense, batch, branch, layer, BLOCK, score)
        values = sorted(value for document in scores for value in document if math.isfinite(value))
        middle = len(values) // 2
        found.append((values[middle - 1] + values[middle]) / 2)
    return tuple(found)


SCORE_CASES = [
    (f, n, s)
    for f, n in CASES
    for s in ("paper", "mass", "causal")
    if s == "paper" or f in ("llama", "mistral", "opt-350m")
]


@pytest.mark.parametrize(("family", "name", "score"), SCORE_CASES)
def test_thresholds(family: str, name: str, score: str, device: torch.device) -> None:
    dense, _ = pair(family, device, config(mode="dense"))
    batch = make_batch(name, device)
    thresholds = {branch: middle_thresholds(dense, batch, branch, score) for branch in BRANCHES}
    settings = config(mode="forward", score=score, **{b: {"threshold": t} for b, t in thresholds.items()})
    dense, sparse = pair(family, device, settings)
    run, plans = compare(dense, sparse, batch)
    everything = real_rows(batch)
    for layer in range(3):
        for branch in BRANCHES:
            scores = layer_scores(run, dense, batch, branch, layer, BLOCK, score)
            want = expected_rows(scores, batch, BLOCK, threshold=thresholds[branch][layer])
            assert plans.get((layer, branch), everything) == want, (layer, branch)
    assert any(plans[key] < everything for key in plans), "nothing was left out: the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_trained(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5), lora=False)
    compare(dense, sparse, make_batch("left", device, label_all=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, reentrant: bool, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5))
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        sparse.enable_input_require_grads()
    compare(dense, sparse, make_batch("right", device))


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_eager_attention(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5), attention="eager")
    compare(dense, sparse, make_batch("left", device))


def test_accumulation_normalises_over_all_micro_batches(device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.5))
    batches = [make_batch("right", device), make_batch("packed2", device)]
    items = sum(batch.label_count() for batch in batches)
    for batch in batches:
        sparse(**batch.inputs(), num_items_in_batch=items).loss.backward()
        plans = rows_of_plans(sparse)
        masked_dense(dense, batch, plans, num_items_in_batch=items).loss.backward()
    assert_same_gradients(gradients(sparse), gradients(dense))


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_autocast(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5))
    batch = make_batch("right", device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = sparse(**batch.inputs()).loss
    loss.backward()
    mine, plans = gradients(sparse), rows_of_plans(sparse)
    runs = []
    for low in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            want = masked_dense(dense, batch, plans).loss
        want.backward()
        runs.append(gradients(dense))
    exact, low_precision = ({n: g.double() for n, g in run.items()} for run in runs)
    error = sum((mine[n].double() - g).square().sum() for n, g in exact.items()).sqrt()
    own_error = sum((low_precision[n] - g).square().sum() for n, g in exact.items()).sqrt()
    assert own_error > 0
    assert error <= 2 * own_error


@pytest.mark.parametrize("name", ["plain", "right"])
def test_statistics_are_those_of_the_plans(name: str, device: torch.device) -> None:
    _, sparse = pair("llama", device, config(mode="forward", **KEEPS["unequal"]))
    batch = make_batch(name, device)
    step(sparse, batch)
    plans, total = rows_of_plans(sparse), len(real_rows(batch))
    stats = lemo.models.get_runtime(sparse).collect()
    for layer in range(3):
        shares = tuple(len(plans[(layer, branch)]) / total for branch in BRANCHES)
        assert stats.keep[layer] == pytest.approx(shares)
    assert stats.fidelity_mean is None


@pytest.mark.parametrize("family", ["llama", "mistral", "opt-350m"])
def test_evaluation_is_dense_unless_asked(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5))
    batch = make_batch("left", device)
    dense.eval(), sparse.eval()
    real = batch.real_mask()
    with torch.no_grad():
        want = dense(**batch.inputs())
        assert torch.equal(sparse(**batch.inputs()).logits[real], want.logits[real])
        outputs: list[torch.Tensor] = []
        with lemo.models.sparse_evaluation(sparse), hooks(record_layers(sparse, outputs)):
            sparse(**batch.inputs())
        run = masked_dense(dense, batch, rows_of_plans(sparse))
        for mine, theirs in zip(outputs, run.outputs, strict=True):
            assert_same_hidden(mine[real], theirs[real])
        assert torch.equal(sparse(**batch.inputs()).logits[real], want.logits[real])


def _hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    with torch.no_grad(), hooks(record_layers(model, outputs)):
        model(**batch.inputs())
    return torch.stack(outputs)


def _leak(model: nn.Module, batch: Batch, t: int) -> float:
    """Largest change, before position t, of any layer's output when token t changes, as a share of the largest
    output. Rounding alone moves it a little: other rows taking part later change the shapes of matrix products."""
    before = _hidden(model, batch)
    token = batch.input_ids[0, t].item()
    batch.input_ids[0, t] = token % 100 + 7
    after = _hidden(model, batch)
    batch.input_ids[0, t] = token
    assert (after[:, 0, t] - before[:, 0, t]).abs().max() > 1e-3, "the change did nothing"
    return ((after[:, 0, :t] - before[:, 0, :t]).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_causal_selection_keeps_the_future_out(family: str, device: torch.device) -> None:
    leaks: dict[str, float] = {}
    for score in ("causal", "paper"):
        batch = make_batch("plain", device)
        dense, _ = pair(family, device, config(mode="dense"))
        thresholds = {branch: middle_thresholds(dense, batch, branch, score) for branch in BRANCHES}
        settings = config(mode="forward", score=score, **{b: {"threshold": v} for b, v in thresholds.items()})
        _, sparse = pair(family, device, settings)
        leaks[score] = max(_leak(sparse, batch, t) for t in range(4, 43, 3))
    assert leaks["causal"] <= 1e-6
    assert leaks["paper"] > 1e-3


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_keep_leaks_and_backward_mode_does_not(family: str, device: torch.device) -> None:
    batch = make_batch("plain", device)
    _, top_k = pair(family, device, config(mode="forward", keep=0.5))
    _, backward = pair(family, device, config(fidelity=0.5))
    places = (7, 13, 20, 26, 33, 41)
    assert max(_leak(top_k, batch, t) for t in places) > 1e-3
    assert max(_leak(backward, batch, t) for t in places) <= 1e-6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_some_passes_run_dense(checkpointed: bool, device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.5, dense_share=0.4))
    if checkpointed:
        sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch("plain", device)
    wanted = step(dense, batch)
    runtime = get_runtime(sparse)
    assert runtime is not None
    keeps = []
    torch.manual_seed(0)
    for _ in range(30):
        loss, got = step(sparse, batch)
        keeps.append(runtime.collect().keep_mean)
        if keeps[-1] == 1.0:
            torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=0)
            assert_same_gradients(got, wanted[1])
        else:
            assert abs(loss - wanted[0]) > 1e-4
        with torch.no_grad():
            sparse.eval()(input_ids=batch.input_ids)  # evaluation doesn't count
            sparse.train()
    assert 6 <= keeps.count(1.0) <= 18, "12 expected, standard deviation 2.7"
