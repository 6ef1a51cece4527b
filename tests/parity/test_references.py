"""The references themselves, against unmodified models: leaving nothing out must be ordinary autograd."""

from __future__ import annotations

import pytest
import torch
from forward_reference import masked_dense, real_rows

from reference import (
    EnergyRule,
    assert_same_gradients,
    backward_reference,
    energy_rows,
    gradients,
    segment_loss,
    spans_of,
)
from tiny import BATCHES, FAMILIES, Batch, build, make_batch

EVERY = [(family, batch) for family in FAMILIES for batch in ("left", "packed2")]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_nothing_left_out_is_dense_autograd(family: str, name: str, device: torch.device) -> None:
    model, batch = build(family, device), make_batch(name, device)
    loss, _ = backward_reference(model, batch, lambda i, g: real_rows(batch), kv_grad="kept")
    hooked = gradients(model)
    masked_dense(model, batch, {}).loss.backward()
    assert_same_gradients(gradients(model), hooked)
    if batch.position_ids is not None and family.startswith("opt"):
        return  # transformers lets OPT's packed documents see each other; the next test covers this case
    dense = model(**batch.inputs()).loss
    dense.backward()
    torch.testing.assert_close(loss, dense.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(hooked, gradients(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_separate_documents(family: str, device: torch.device) -> None:
    model, batch = build(family, device), make_batch("packed", device)
    loss, _ = backward_reference(model, batch, lambda i, g: real_rows(batch))
    packed = gradients(model)
    total = torch.zeros((), device=device)
    for document in batch.documents:
        alone = slice(document[0], document[-1] + 1)
        part = model(
            input_ids=batch.input_ids[:, alone],
            labels=batch.labels[:, alone],
            use_cache=False,
            num_items_in_batch=batch.label_count(),
        ).loss
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    assert_same_gradients(packed, gradients(model))


@pytest.mark.parametrize("name", BATCHES)
def test_all_spans_are_the_whole_loss(name: str, device: torch.device) -> None:
    model, batch = build("qwen3", device), make_batch(name, device)
    output = model(**batch.inputs())
    drawn = [spans_of(document, 4) for document in batch.documents]
    loss = segment_loss(output.logits, batch, drawn, 1.0, batch.label_count())
    torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=0)


def _gradient_of_blocks(batch: Batch, energies: list[float], block_size: int) -> torch.Tensor:
    gradient = torch.zeros(batch.rows, 1)
    for block, energy in enumerate(energies):
        rows = batch.documents[0][block * block_size : (block + 1) * block_size]
        gradient[rows] = (energy / len(rows)) ** 0.5
    return gradient.view(*batch.input_ids.shape, 1)


@pytest.mark.parametrize(
    ("rule", "blocks"),
    [
        # rows 34..41 predict labels: blocks 5 and 6 (0.2), then the sink (0.05), then 7 (0.4)
        (EnergyRule(fidelity=0.5), {0, 5, 6, 7}),
        (EnergyRule(fidelity=0.5, keep_sink=False), {5, 6, 7}),
        (EnergyRule(fidelity=1.0), {0, 1, 2, 5, 6, 7}),
        (EnergyRule(fidelity=1.0, keep_sink=False), {0, 1, 2, 5, 6, 7}),
        (EnergyRule(fidelity=0.5, labelled="ranked"), {0, 1, 7}),
        (EnergyRule(fidelity=0.99, keep=0.3, labelled="ranked"), {0, 1, 7}),
        (EnergyRule(fidelity=0.99, keep=0.1, labelled="ranked"), {7}),  # one block may stay: the sink isn't it
        (EnergyRule(fidelity=0.99, keep=0.3), {0, 5, 6}),
        (EnergyRule(fidelity=0.99, keep=0.25), {5, 6}),
    ],
)
def test_energy_rule_by_hand(rule: EnergyRule, blocks: set[int]) -> None:
    batch = make_batch("plain")
    gradient = _gradient_of_blocks(batch, [0.05, 0.2, 0.15, 0.0, 0.0, 0.1, 0.1, 0.4], rule.block_size)
    kept = energy_rows(gradient, batch, rule)
    want = {row for row in range(43) if row // rule.block_size in blocks}
    assert kept == want
