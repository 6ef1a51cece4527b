"""The `segments` policy: drawn spans' losses, gradients cut to the drawn rows, unbiased for the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from pairs import config, pair, step
from torch import nn

import lemo
from reference import assert_same_gradients, backward_reference, gradients, segment_loss, spans_of
from tiny import CASES, Batch, make_batch


def drawn_spans(model: nn.Module) -> list[list[tuple[int, int]]]:
    """The spans of the last forward, by document, as rows of the flattened batch."""
    runtime = lemo.models.get_runtime(model)
    assert runtime is not None
    return [[(int(start), int(end)) for start, end in spans] for spans in runtime.last_spans]


def reference_step(
    dense: nn.Module, batch: Batch, drawn: list[list[tuple[int, int]]], scale: float, items: int
) -> torch.Tensor:
    """Gradients stay in `.grad`; the same rows in every layer, keys and values cut too."""
    rows = {row for spans in drawn for start, end in spans for row in range(start, end)}
    loss, _ = backward_reference(
        dense,
        batch,
        lambda layer, gradient: rows,
        kv_grad="kept",
        loss_of=lambda output: segment_loss(output.logits, batch, drawn, scale, items),
    )
    return loss


SPANS = 3
DRAWN_CASES = [(f, n, drawn) for f, n in CASES for drawn in (1, 2) if drawn == 1 or f in ("llama", "opt")]


@pytest.mark.parametrize(("family", "name", "drawn"), DRAWN_CASES)
def test_loss_and_gradients(family: str, name: str, drawn: int, device: torch.device) -> None:
    settings = config(policy="segments", segments={"spans": SPANS, "drawn": drawn})
    dense, sparse = pair(family, device, settings)
    batch = make_batch(name, device, label_all=True)
    loss, got = step(sparse, batch)
    chosen = drawn_spans(sparse)
    assert len(chosen) == len(batch.documents)
    for document, mine in zip(batch.documents, chosen, strict=True):
        assert len(set(mine)) == drawn
        assert set(mine) <= set(spans_of(document, SPANS))
    want = reference_step(dense, batch, chosen, SPANS / drawn, batch.label_count())
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))


@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_every_parameter_trained(family: str, device: torch.device) -> None:
    settings = config(policy="segments", segments={"spans": 3, "drawn": 1})
    dense, sparse = pair(family, device, settings, lora=False)
    batch = make_batch("left", device, label_all=True)
    _, got = step(sparse, batch)
    reference_step(dense, batch, drawn_spans(sparse), 3.0, batch.label_count())
    assert_same_gradients(got, gradients(dense))


def test_accumulation_normalises_over_all_micro_batches(device: torch.device) -> None:
    settings = config(policy="segments", segments={"spans": 4, "drawn": 2})
    dense, sparse = pair("qwen2", device, settings)
    batches = [
        make_batch("right", device, label_all=True),
        make_batch("plain", device, label_all=True, seed=5),
    ]
    items = sum(batch.label_count() for batch in batches)
    for batch in batches:
        loss = sparse(**batch.inputs(), num_items_in_batch=torch.tensor(items, device=device)).loss
        loss.backward()
        want = reference_step(dense, batch, drawn_spans(sparse), 2.0, items)
        torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(sparse), gradients(dense))


def _all_draws(sparse: nn.Module, batch: Batch, draws: int, forwards: int) -> dict[tuple, float]:
    losses: dict[tuple, float] = {}
    with torch.no_grad():
        for _ in range(forwards):
            loss = sparse(**batch.inputs()).loss.item()
            losses[tuple(tuple(sorted(spans)) for spans in drawn_spans(sparse))] = loss
    assert len(losses) == draws
    return losses


@pytest.mark.parametrize(("spans", "drawn", "draws"), [(4, 1, 4), (4, 2, 6), (4, 4, 1)])
@pytest.mark.parametrize("label_all", [True, False])
def test_mean_over_all_draws_is_the_dense_loss(
    spans: int, drawn: int, draws: int, label_all: bool, device: torch.device
) -> None:
    dense, sparse = pair("llama", device, config(policy="segments", segments={"spans": spans, "drawn": drawn}))
    batch = make_batch("plain", device, label_all=label_all)
    losses = _all_draws(sparse, batch, draws, forwards=60)
    assert sum(losses.values()) / len(losses) == pytest.approx(dense(**batch.inputs()).loss.item(), rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_short_documents_stay_unbiased(length: int, device: torch.device) -> None:
    """Six tokens in four spans of two make three spans, not four: the scale must still be right."""
    dense, sparse = pair("llama", device, config(policy="segments", segments={"spans": 4, "drawn": 1}))
    batch = make_batch("plain", device, label_all=True)
    length += 1  # the last token predicts nothing; keep at least one loss
    batch.input_ids, batch.labels = batch.input_ids[:, :length], batch.labels[:, :length]
    batch.documents = [list(range(length))]
    losses: dict[tuple, float] = {}
    with torch.no_grad():
        for _ in range(60):
            loss = sparse(**batch.inputs()).loss.item()
            losses[tuple(map(tuple, drawn_spans(sparse)))] = loss
    assert sum(losses.values()) / len(losses) == pytest.approx(dense(**batch.inputs()).loss.item(), rel=1e-6)


def test_draws_are_uniform_and_documents_independent(device: torch.device) -> None:
    _, sparse = pair("llama", device, config(policy="segments", segments={"spans": 3, "drawn": 1}))
    batch = make_batch("right", device, label_all=True)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.product(range(3), repeat=3), 0)
    with torch.no_grad():
        for _ in range(270):
            sparse(**batch.inputs())
            chosen = drawn_spans(sparse)
            index = [spans_of(d, 3).index(s[0]) for d, s in zip(batch.documents, chosen, strict=True)]
            counts[tuple(index)] += 1
    for document in range(3):
        for span in range(3):
            share = sum(n for key, n in counts.items() if key[document] == span)
            assert 60 <= share <= 120, "90 expected, standard deviation 7.7"
    assert sum(n > 0 for n in counts.values()) >= 24, "27 combinations, 10 expected of each"


def test_random_state_replays_the_draws(device: torch.device) -> None:
    _, sparse = pair("llama", device, config(policy="segments", segments={"spans": 4, "drawn": 1}))
    batch = make_batch("right", device, label_all=True)

    def draws() -> list:
        seen = []
        with torch.no_grad():
            for _ in range(8):
                sparse(**batch.inputs())
                seen.append(drawn_spans(sparse))
        return seen

    state = torch.get_rng_state()
    first, second = draws(), draws()
    assert first != second
    torch.set_rng_state(state)
    assert draws() == first
    assert draws() == second
