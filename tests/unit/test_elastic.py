"""Neurons that are always at zero go, and nothing else changes: neither outputs nor the training that follows."""

from __future__ import annotations

import copy

import pytest
import torch

from lemo.selection.elastic import LEAST_WIDTH, ZeroCounts, prune
from lemo.selection.predictor import KINDS, Blocks, LowRankNetwork, Predictor

D, SIZE, TOKENS = 10, 8, 44
WIDTHS = (9, 8, 6)


def build(branch: str) -> Predictor:
    """A predictor whose neurons 2 of the first and 3 of the second layer never wake, nor output 1 of a pair."""
    torch.manual_seed(0)
    predictor = KINDS[branch](D, WIDTHS).double()
    # Inputs are never negative, so these are at zero whatever comes.
    for network in predictor.networks.values():
        assert isinstance(network, LowRankNetwork)
        first, second, third = network.matrices
        first.data[2].abs_().neg_()
        second.data[3].abs_().neg_()
        second.data[:, 2 * len(first) :] = second.data[:, 2 * len(first) :].abs() * torch.arange(1, 9)[:, None].ne(4)
        if branch == "attention" and network is predictor.networks["query"]:
            third.data[1].neg_()
    return predictor


def inputs() -> torch.Tensor:
    return torch.rand(TOKENS, D, dtype=torch.float64)


def step(predictor: Predictor, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    found = predictor.activations(x, Blocks(TOKENS, SIZE))
    # The outputs of a pair are multiplied, so one that either leaves at zero teaches the other nothing.
    outputs = torch.stack([a[-1] for a in found.values()]).prod(0)
    loss = (outputs**2).sum() - outputs.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return {name: [a.detach() for a in activations] for name, activations in found.items()}


def counts_of(predictor: Predictor) -> dict[str, ZeroCounts]:
    found = {}
    for name, network in predictor.networks.items():
        assert isinstance(network, LowRankNetwork)
        found[name] = ZeroCounts(network)
    return found


@pytest.mark.parametrize("branch", KINDS)
def test_pruning_dead_neurons_changes_nothing_that_follows(branch: str) -> None:
    """Adam's moments stay with their weights: the pruned network trains on exactly as the whole one."""
    whole = build(branch)
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-4)
    # The same inputs throughout: a neuron that others' outputs could wake isn't dead.
    x = inputs()
    for _ in range(3):
        step(whole, optimizer, x)
    pruned = copy.deepcopy(whole)
    other = torch.optim.Adam(pruned.parameters(), lr=1e-4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    counts = counts_of(pruned)
    with torch.no_grad():
        for name, activations in pruned.activations(x, Blocks(TOKENS, SIZE)).items():
            counts[name].add(activations)
    before = [id(p) for p in pruned.parameters()]
    prune(pruned, counts, 0.999, other)
    assert [id(p) for p in pruned.parameters()] == before
    for name, network in pruned.networks.items():
        outputs = WIDTHS[2] - 1 if branch == "attention" else 1
        assert network.widths[0] < WIDTHS[0], name
        assert network.widths[1] < WIDTHS[1], name
        assert network.widths[2] <= outputs, name
    for parameter in pruned.parameters():
        assert all(v.shape == parameter.shape for v in other.state[parameter].values() if v.dim())
    assert pruned.size < whole.size
    for _ in range(3):
        a, b = step(whole, optimizer, x), step(pruned, other, x)
        for name in a:
            outputs = [n for n in range(a[name][-1].shape[1]) if not (branch == "attention" and n == 1)]
            torch.testing.assert_close(b[name][-1], a[name][-1][:, outputs])


def test_a_pairs_outputs_go_together() -> None:
    predictor = build("attention")
    optimizer = torch.optim.Adam(predictor.parameters())
    counts = counts_of(predictor)
    x = inputs()
    for name, activations in predictor.activations(x, Blocks(TOKENS, SIZE)).items():
        counts[name].add(activations)
    wanted = predictor.pair_scores(x, Blocks(TOKENS, SIZE))
    prune(predictor, counts, 0.999, optimizer)
    widths = {network.widths[2] for network in predictor.networks.values()}
    assert len(widths) == 1
    torch.testing.assert_close(predictor.pair_scores(x, Blocks(TOKENS, SIZE)), wanted)


def test_the_busiest_few_stay() -> None:
    predictor = build("attention")
    optimizer = torch.optim.Adam(predictor.parameters())
    counts = counts_of(predictor)
    for name, activations in predictor.activations(inputs(), Blocks(TOKENS, SIZE)).items():
        counts[name].add([torch.zeros_like(a) for a in activations])
    prune(predictor, counts, 0.5, optimizer)
    assert all(network.widths == (LEAST_WIDTH,) * 3 for network in predictor.networks.values())


def test_frequencies_are_means_over_documents_since_the_last_reset() -> None:
    predictor = build("mlp")
    count = counts_of(predictor)["activity"]
    assert all(not f.any() for f in count.frequencies())
    zero, one = torch.zeros(4, 9), torch.ones(4, 9)
    count.add([zero, zero[:, :8], zero[:, :1]])
    count.add([one, one[:, :8], one[:, :1]])
    assert all(bool((f == 0.5).all()) for f in count.frequencies())
    count.reset()
    assert all(not f.any() for f in count.frequencies())
