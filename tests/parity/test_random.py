"""`policy: random`: equals the hooked dense reference on blocks that a plain loop draws with the same seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pairs import TINY_TILE_MIB, config, pair, rows_of_plans, step
from torch import Tensor

import lemo
from lemo.config import RunConfig
from lemo.errors import UserError
from lemo.models.runtime import Runtime
from lemo.training.checks import check_labels_fit
from reference import assert_same_gradients, backward_reference, blocks_of, gradients
from tiny import BLOCK, CASES, FAMILIES, Batch, make_batch

SEED = 7


class Draw:
    """The rule in plain loops: labelled blocks, then those with the largest of one number drawn for each block."""

    def __init__(self, batch: Batch, keep: float, labelled: str = "always") -> None:
        self.batch, self.keep, self.labelled = batch, keep, labelled
        # The pass takes a number from torch's stream.
        self.number = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(SEED)))
        self.fidelity: dict[int, float] = {}

    def __call__(self, layer: int, gradient_BTD: Tensor) -> set[int]:
        energy = gradient_BTD.detach().double().pow(2).sum(-1).flatten()
        labels = self.batch.labelled_rows() if self.labelled == "always" else set()
        kept: set[int] = set()
        held = []
        generator = random.Random(f"{self.number} 0 {layer}")
        for document in self.batch.documents:
            blocks = blocks_of(document, BLOCK)
            drawn = [generator.random() for _ in blocks]
            order = sorted(range(len(blocks)), key=lambda i: (not labels.intersection(blocks[i]), -drawn[i]))
            rows = {row for i in order[: -int(-self.keep * len(blocks) // 1)] for row in blocks[i]}
            total = energy[document].sum()
            held.append(float(energy[sorted(rows)].sum() / total) if total > 0 else 1.0)
            kept |= rows
        self.fidelity[layer] = sum(held) / len(held)
        return kept


def runtime_of(model: Any) -> Runtime:
    runtime = lemo.models.get_runtime(model)
    assert runtime is not None
    return runtime


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_equal_hooked_dense(family: str, name: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(policy="random", keep=0.5, tile_mib=TINY_TILE_MIB))
    batch = make_batch(name, device)
    draw = Draw(batch, 0.5)
    want_loss, rows = backward_reference(dense, batch, draw)
    torch.manual_seed(SEED)
    loss, got = step(sparse, batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    plans = rows_of_plans(sparse)
    assert [plans[i, "attention"] for i in range(3)] == [plans[i, "mlp"] for i in range(3)] == rows
    assert_same_gradients(got, gradients(dense))
    fidelity = runtime_of(sparse).collect().fidelity
    assert fidelity == pytest.approx([draw.fidelity[i] for i in range(3)], rel=1e-4)
    assert min(draw.fidelity.values()) < 0.999, "nothing that matters was left out"


@pytest.mark.parametrize("kv_grad", ["all", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_competes_when_ranked(family: str, kv_grad: str, device: torch.device) -> None:
    settings = config(policy="random", keep=0.5, labelled="ranked", kv_grad=kv_grad)
    dense, sparse = pair(family, device, settings)
    batch = make_batch("right", device, label_all=True)
    backward_reference(dense, batch, Draw(batch, 0.5, "ranked"), kv_grad=kv_grad)
    torch.manual_seed(SEED)
    assert_same_gradients(step(sparse, batch)[1], gradients(dense))


def test_draws_differ_by_layer_and_step_and_follow_the_state(device: torch.device) -> None:
    _, sparse = pair("llama", device, config(policy="random", keep=0.5))
    batch = make_batch("plain", device)
    torch.manual_seed(SEED)
    step(sparse, batch)
    first = rows_of_plans(sparse)
    assert len({frozenset(rows) for rows in first.values()}) > 1
    state = torch.get_rng_state()
    step(sparse, batch)
    second = rows_of_plans(sparse)
    assert second != first
    torch.set_rng_state(state)
    step(sparse, batch)
    assert rows_of_plans(sparse) == second


def test_labelled_blocks_over_the_cap_are_an_error(device: torch.device) -> None:
    _, sparse = pair("llama", device, config(policy="random", keep=0.5))
    with pytest.raises(ValueError, match=r"labelled blocks alone exceed keep=0\.5"):
        sparse(**make_batch("plain", device, label_all=True).inputs()).loss.backward()


def test_labels_over_the_share_are_found_before_training() -> None:
    settings = RunConfig(sparsity=config(policy="random", keep=0.5))
    tail = {"name": "a", "input_ids": [5] * 40, "labels": [-100] * 30 + [5] * 10}
    check_labels_fit([tail], settings)
    with pytest.raises(UserError, match=r"a: 7 of its 7 blocks hold labels, but sparsity\.keep=0\.5 allows 4"):
        check_labels_fit([tail | {"labels": [5] * 40}], settings)
