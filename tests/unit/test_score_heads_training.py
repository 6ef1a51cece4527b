"""Training of score heads: they gain on the documents they see, each layer as if alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from attention_calls import SIZE, attention_calls, begun, queries_keys, rotate_of
from lemo.selection.examples import GIB
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.score_heads import ScoreHeads, random_heads
from lemo.selection.score_heads_training import HeadsExample, HeadsTraining, blocks_of_parts, part_of
from lemo.selection.scores import block_pair_scores

TOKENS = 120


def example_of(family: str, seed: int, part: int = SIZE) -> HeadsExample:
    calls = attention_calls(family, TOKENS, seed)
    exact = [block_pair_scores(*queries_keys(c), c.view.scaling, part, c.view.window) for c in calls]
    return HeadsExample(torch.stack([c.x for c in calls]), torch.stack(exact), [rotate_of(c) for c in calls])


def begun_all(family: str, count: int) -> tuple[list[ScoreHeads], list[int | None]]:
    calls = attention_calls(family, TOKENS, 0)
    return [begun(call, count) for call in calls], [call.view.window for call in calls]


def error(heads: list[ScoreHeads], windows: list[int | None], example: HeadsExample) -> float:
    """Mean over layers of the variance of block scores' logarithms' error."""
    found = []
    for layer, (one, window) in enumerate(zip(heads, windows, strict=True)):
        q, k = one.positioned(example.x[layer], example.rotate[layer])
        sums = [pairs.sum(0).log() for pairs in (one.pair_scores(q, k, SIZE, window), example.exact[layer])]
        found.append(float((sums[0] - sums[1]).var()))
    return sum(found) / len(found)


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "opt"])
def test_training_gains_on_what_it_sees(family: str) -> None:
    """On others too for OPT; elsewhere random tokens and weights leave little to learn, and little is lost."""
    heads, windows = begun_all(family, 2)
    seen, judged = ([example_of(family, seed) for seed in range(first, first + 8)] for first in (1, 20))

    def errors(heads: list[ScoreHeads]) -> list[float]:
        return [sum(error(heads, windows, example) for example in documents) for documents in (seen, judged)]

    before = errors(heads)
    first = copy.deepcopy(heads)
    training = HeadsTraining(heads, windows, SIZE, PredictorConfig(head_steps=60))
    for number, example in enumerate(seen, start=1):
        training.see(example, 60 * number // 8)
    assert training.step == 60
    finished = training.finish()
    after = errors(finished)
    assert after[0] < 0.8 * before[0]
    assert after[1] < (0.85 if family == "opt" else 1.1) * before[1]
    assert not any(p.requires_grad for one in finished for p in one.parameters())
    for name, value in finished[1].state_dict().items():
        if not name.endswith(("eps", "key_of")):
            assert not torch.equal(value, first[1].state_dict()[name]), name
    # They stay near those they began as.
    moved = finished[1].query.matrix - first[1].query.matrix
    assert moved.std() < 0.3 * first[1].query.matrix.std()


def test_layers_train_side_by_side_as_each_does_alone() -> None:
    heads, windows = begun_all("llama", 2)
    config = PredictorConfig(head_steps=8)
    alone = [HeadsTraining([copy.deepcopy(one)], [None], SIZE, config) for one in heads]
    together = HeadsTraining(heads, windows, SIZE, config)
    for seed in (1, 2):
        example = example_of("llama", seed)
        together.see(example, 4 * seed)
        for layer, training in enumerate(alone):
            part = slice(layer, layer + 1)
            training.see(HeadsExample(example.x[part], example.exact[part], example.rotate[part]), 4 * seed)
    for found, training in zip(together.finish(), alone, strict=True):
        (wanted,) = training.finish()
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, wanted.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_an_estimate_is_that_of_the_kernel_where_keys_are_shared(count: int) -> None:
    """Two heads with one key, and three with two, which aren't shared evenly."""
    calls, example = attention_calls("llama", TOKENS, 0), example_of("llama", 1)
    heads = [begun(call, count, shared=True) for call in calls]
    training = HeadsTraining(heads, [None] * len(heads), SIZE, PredictorConfig())
    for layer, one in enumerate(heads):
        q, k = one.positioned(example.x[layer], example.rotate[layer])
        wanted = one.pair_scores(q, k, SIZE, None)
        torch.testing.assert_close(training._estimates(example, layer, SIZE), wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_are_exact_stand_still() -> None:
    heads, windows = begun_all("llama", 4)
    first = copy.deepcopy(heads)
    training = HeadsTraining(heads, windows, SIZE, PredictorConfig(head_steps=5), still=[0])
    training.see(example_of("llama", 1), 5)
    found = training.finish()
    assert torch.equal(found[0].query.matrix, first[0].query.matrix)
    assert not torch.equal(found[1].query.matrix, first[1].query.matrix)
    none = HeadsTraining(found, windows, SIZE, PredictorConfig(), still=range(len(found)))
    none.see(example_of("llama", 1), 5)
    assert none.step == 0


def test_no_steps_leave_true_heads() -> None:
    heads, windows = begun_all("llama", 2)
    first = copy.deepcopy(heads)
    training = HeadsTraining(heads, windows, SIZE, PredictorConfig(head_steps=0))
    training.see(example_of("llama", 1), 5)
    for found, wanted in zip(training.finish(), first, strict=True):
        torch.testing.assert_close(found.query.matrix, wanted.query.matrix, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [64, 75, 90])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_scores_of_parts_make_those_of_blocks(first: int, tokens: int) -> None:
    """Also where the blocks begin at another part: as if there were no rows before it."""
    torch.manual_seed(0)
    q, k = torch.randn(4, tokens, 8), torch.randn(2, tokens, 8)
    parts = block_pair_scores(q, k, 0.3, 4, None)[first:, first:]
    found = blocks_of_parts(parts, 4)
    torch.testing.assert_close(found, block_pair_scores(q[:, 4 * first :], k[:, 4 * first :], 0.3, 16, None))


def test_parts_of_blocks() -> None:
    assert [part_of(size, 4096) for size in (8, 16, 32, 48, 64, 100, 128)] == [8, 16, 16, 24, 16, 25, 32]
    assert [part_of(64, tokens) for tokens in (8192, 8193, 32768)] == [16, 32, 64]


def test_blocks_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    example = example_of("llama", 1, part=16)
    heads, windows = begun_all("llama", 1)
    training = HeadsTraining(heads, windows, 32, PredictorConfig(head_steps=20))
    starts = set()
    loss = training._loss

    def watched(example: HeadsExample, layer: int, part: int, first: int) -> Tensor:
        starts.add((part, first))
        return loss(example, layer, part, first)

    monkeypatch.setattr(training, "_loss", watched)
    training.see(example, 20)
    assert starts == {(16, 0), (16, 1)}


def test_old_documents_are_forgotten_when_memory_is_full() -> None:
    x, exact = torch.randn(1, 40, 12), torch.rand(1, 5, 5).tril()
    example = HeadsExample(x, exact, [lambda heads: heads.transpose(0, 1)])
    config = PredictorConfig(head_steps=9, memory_gib=2.5 * 4 * (x.numel() + exact.numel()) / GIB)
    training = HeadsTraining([random_heads(2, 2, 6, 12)], [None], SIZE, config)
    held = []
    for number in range(1, 5):
        training.see(example, number)
        held.append(len(training._memory))
    assert held == [1, 2, 2, 2]
