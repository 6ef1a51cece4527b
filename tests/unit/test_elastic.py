"""The idlest neurons go; where they were always at zero neither outputs nor the training that follows change."""

from __future__ import annotations

import copy

import torch

from lemo.selection.elastic import LEAST_WIDTH, ZeroCounts, prune
from lemo.selection.predictor import ActivityPredictor
from lemo.selection.predictor_stack import Active, PredictorStack

LAYERS, D, TOKENS = 2, 10, 44
WIDTHS = (9, 8)
# All but one neuron of each of the first two layers.
BUT_ONE = 0.88


def build() -> PredictorStack:
    """Neurons 2 of the first and 3 of the second matrix never wake in model layer 0."""
    torch.manual_seed(0)
    stack = PredictorStack([ActivityPredictor(D, WIDTHS).double() for _ in range(LAYERS)]).double()
    # Inputs are never negative, so these are at zero whatever comes; all others are awake.
    for matrix in stack.matrices:
        matrix.data.abs_()
    stack.first.data[0, 2].neg_()
    stack.second.data[0, 3].neg_()
    return stack


def inputs() -> torch.Tensor:
    return torch.rand(LAYERS, TOKENS, D, dtype=torch.float64)


def step(stack: PredictorStack, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    outputs = stack(x).top
    loss = ((outputs - 1) ** 2).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return outputs[0].detach()


def counted(stack: PredictorStack, x: torch.Tensor) -> ZeroCounts:
    counts = ZeroCounts(stack)
    counts.add(stack(x))
    return counts


def test_pruning_dead_neurons_changes_nothing_that_follows() -> None:
    """Adam's moments stay with their weights: layer 0, which loses none but dead ones, trains on exactly as before."""
    whole = build()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4, weight_decay=0.1)
    # The same inputs throughout: a neuron that others' outputs could wake isn't dead.
    x = inputs()
    for _ in range(3):
        step(whole, optimizer, x)
    pruned = copy.deepcopy(whole)
    other = torch.optim.AdamW(pruned.parameters(), lr=1e-4, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    prune(pruned, counted(pruned, x), BUT_ONE, other)
    assert [(~awake[0]).nonzero().flatten().tolist() for awake in pruned.awake] == [[2], [3]]
    for _ in range(3):
        torch.testing.assert_close(step(pruned, other, x), step(whole, optimizer, x))
    for matrix, awake in zip(pruned.matrices, pruned.awake, strict=False):
        assert not matrix[~awake].any()


def test_what_has_momentum_stays_at_zero_when_taken_out() -> None:
    stack = build()
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    for _ in range(3):
        step(stack, optimizer, inputs())
    low, middle = (torch.zeros_like(a, dtype=torch.float32) for a in stack.awake)
    low[1, :3] = 0.5
    middle[1, 5:7] = 0.5
    counts = ZeroCounts(stack)
    counts.documents, counts._zeros = 1, [low, middle]
    prune(stack, counts, 0.7, optimizer)
    for _ in range(3):
        step(stack, optimizer, inputs())
    assert not stack.first[1, :3].any()
    assert not stack.second[1, 5:7].any()
    assert not stack.third[1, :, 5:7].any()
    assert stack.first[1, 3:].any(1).all()
    assert stack.second[1, :5].any(1).all()


def test_a_finished_predictor_is_smaller_and_puts_out_the_same() -> None:
    stack, x = build(), inputs()
    wanted = stack(x).top[0]
    size = stack.predictors[0].size
    prune(stack, counted(stack, x), BUT_ONE, torch.optim.AdamW(stack.parameters()))
    pruned, other = stack.finish()
    assert pruned.size == other.size < size
    assert [len(matrix) for matrix in pruned.matrices] == [8, 7, 1]
    torch.testing.assert_close(pruned.activity(x[0]), wanted)


def test_the_busiest_few_stay() -> None:
    stack = build()
    counts, active = ZeroCounts(stack), stack(inputs())
    counts.add(Active(*(torch.zeros_like(a) for a in (active.low, active.middle, active.top))))
    prune(stack, counts, 0.1, torch.optim.AdamW(stack.parameters()))
    assert all((awake.sum(-1) == LEAST_WIDTH).all() for awake in stack.awake)


def test_the_size_asked_for_is_reached_step_by_step() -> None:
    stack, x = build(), inputs()
    optimizer = torch.optim.AdamW(stack.parameters())
    before = stack.awake
    for share, left in ((0.8, (7, 6)), (0.5, (4, 4))):
        prune(stack, counted(stack, x), share, optimizer)
        assert [int(n) for awake in stack.awake for n in awake.sum(-1).unique()] == list(left)
        # None comes back.
        assert not any((now & ~then).any() for now, then in zip(stack.awake, before, strict=True))
        before = tuple(awake.clone() for awake in stack.awake)


def test_frequencies_are_means_over_documents_since_the_last_reset() -> None:
    stack = build()
    counts, active = ZeroCounts(stack), stack(inputs())
    assert all(not f.any() for f in counts.frequencies())
    for value in (0.0, 1.0):
        counts.add(Active(*(torch.full_like(a, value) for a in (active.low, active.middle, active.top))))
    assert all(bool((f == 0.5).all()) for f in counts.frequencies())
    counts.reset()
    assert all(not f.any() for f in counts.frequencies())
