"""Predictors: their scores are what the exact code makes of their pair scores; none looks ahead where it mustn't."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lemo.config import PredictorConfig
from lemo.models.calibration import widths_of
from lemo.selection import predictor_training
from lemo.selection.layout import build_layout
from lemo.selection.predictor import KINDS, ActivityPredictor, AttentionPredictor, Predictor, predicted_scores
from lemo.selection.predictor_blocks import Blocks, part_of, reaches, scores_of_blocks
from lemo.selection.predictor_stack import PredictorStack
from lemo.selection.predictor_training import GIB, Example, PredictorTraining, recall
from lemo.selection.scores import attention_informativeness, block_pair_scores, mlp_informativeness

D, SIZE = 12, 8


def attention(widths: tuple[int, int, int] = (6, 5, 4)) -> AttentionPredictor:
    torch.manual_seed(0)
    return measured(AttentionPredictor(D, widths))


def measured(predictor: Any) -> Any:
    predictor.center.normal_()
    predictor.spread.uniform_(0.5, 2.0)
    predictor.scale.fill_(0.3)
    return predictor


def same(x: Tensor) -> Tensor:
    return x


def by_the_book(predictor: Predictor, x: Tensor, blocks: Blocks) -> list[Tensor]:
    """Each network's outputs, matrix by matrix and block by block."""
    x = (x - predictor.center) / predictor.spread
    found = []
    for network in predictor.by_name.values():
        first, second, third = (m.to(x.dtype) for m in network.matrices)
        low = torch.relu(x @ first.T)
        if network.pooled:
            parts = low.split(blocks.size)
            mean, largest = torch.stack([p.mean(0) for p in parts]), torch.stack([p.amax(0) for p in parts])
            low = torch.cat([mean, largest, blocks.places(x.device, x.dtype)], 1)
        found.append(torch.relu(torch.relu(low @ second.T) @ third.T))
    return found


@pytest.mark.parametrize("tokens", [SIZE, 3 * SIZE, 41])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_are_those_of_the_pair_scores(tokens: int, causal: bool) -> None:
    predictor, x, blocks = attention(), torch.randn(tokens, D), Blocks(tokens, SIZE)
    pairs = predictor.pair_scores(x, blocks)
    assert pairs.shape == (blocks.count, blocks.count)
    assert not pairs.triu(1).any()
    wanted = attention_informativeness(pairs, causal)
    torch.testing.assert_close(predictor.informativeness(x, blocks, causal), wanted, rtol=1e-5, atol=1e-6)


def test_outputs_meet_over_their_reach() -> None:
    predictor, x = attention((6, 5, 9)), torch.randn(30 * SIZE, D)
    blocks = Blocks(len(x), SIZE)
    query, key = predictor.outputs(x, blocks).chunk(2, 1)
    wanted = torch.zeros(30, 30)
    for i in range(30):
        for j in range(i + 1):
            meet = (i - j < predictor.reach).float()
            wanted[i, j] = (query[i] * key[j] * meet).sum()
    torch.testing.assert_close(predictor.pair_scores(x, blocks), wanted)
    assert predictor.reach[0] == 2
    assert predictor.reach[-1] > 2**20


@pytest.mark.parametrize("width", [1, 4, 5, 32])
def test_reaches_rise_to_the_whole_document(width: int) -> None:
    found = reaches(width)
    assert len(found) == width
    assert (found.diff() >= 0).all()
    assert found[-1] > 2**20


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("tokens", [64, 75, 90])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_scores_of_parts_make_those_of_blocks(first: int, tokens: int, mass: bool) -> None:
    """Also where the blocks begin at another part: as if there were no rows before it, but for mass's denominators."""
    torch.manual_seed(0)
    q, k = torch.randn(4, tokens, 8), torch.randn(2, tokens, 8)
    parts = block_pair_scores(q, k, 0.3, 4, None, mass)[first:, first:]
    rows = tokens - 4 * first
    sizes = torch.tensor([float(min(4, rows - i)) for i in range(0, rows, 4)])
    found = scores_of_blocks(parts, 4, sizes if mass else None)
    if not mass:
        torch.testing.assert_close(found, block_pair_scores(q[:, 4 * first :], k[:, 4 * first :], 0.3, 16, None))
    elif not first:
        torch.testing.assert_close(found, block_pair_scores(q, k, 0.3, 16, None, True))
    else:
        assert found.shape == (-(-rows // 16),) * 2
        assert (found.sum(1) < 1).all()


def test_parts_of_blocks() -> None:
    assert [part_of(size) for size in (8, 16, 32, 48, 64, 100, 128)] == [8, 16, 16, 24, 16, 25, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("branch", KINDS)
def test_networks_of_any_widths_run_as_one(branch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predictor = measured(KINDS[branch](D, (6, 5, 4)))
    first, second = next(iter(predictor.by_name.values())).matrices[:2]
    if branch == "attention":  # As a pruned network would be: narrower than the other.
        first.data, second.data = first.data[1:], torch.cat([second.data[:, 1:6], second.data[:, 7:]], 1)
    x, blocks = torch.randn(41, D).to(dtype), Blocks(41, SIZE)
    wanted = by_the_book(predictor, x.double(), blocks)
    if branch == "mlp":
        wanted = [blocks.mean(by_token) for by_token in wanted]
    wanted[-1] = wanted[-1] * predictor.scale
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    found = predictor.outputs(x, blocks)
    torch.testing.assert_close(found.double(), torch.cat(wanted, 1), **tolerance)
    # Other inputs' dtype: stacked anew.
    torch.testing.assert_close(predictor.outputs(x.float(), blocks), found.float(), **tolerance)


@pytest.mark.parametrize("branch", KINDS)
def test_loaded_matrices_are_taken(branch: str) -> None:
    torch.manual_seed(0)
    predictor, other = (measured(KINDS[branch](D, (6, 5, 4))) for _ in range(2))
    x, blocks = torch.randn(41, D), Blocks(41, SIZE)
    before = predictor.outputs(x, blocks)
    predictor.load_state_dict(other.state_dict())
    assert torch.equal(predictor.outputs(x, blocks), other.outputs(x, blocks))
    assert not torch.equal(predictor.outputs(x, blocks), before)
    assert predictor.double().outputs(x.double(), blocks).dtype == torch.float64


@pytest.mark.parametrize("branch", KINDS)
def test_a_stack_puts_out_what_each_layers_predictor_does(branch: str) -> None:
    torch.manual_seed(0)
    predictors = [measured(KINDS[branch](D, (6, 5, 4))) for _ in range(3)]
    stack, blocks, x = PredictorStack(predictors), Blocks(41, SIZE), torch.randn(3, 41, D)
    active = stack(x, blocks)
    for layer, predictor in enumerate(predictors):
        wanted = torch.stack(by_the_book(predictor, x[layer], blocks))
        torch.testing.assert_close(active.top[layer], wanted, rtol=1e-5, atol=1e-6)
    if branch == "attention":
        wanted = torch.stack([p.pair_scores(y, blocks) / p.scale for p, y in zip(predictors, x, strict=True)])
        torch.testing.assert_close(stack.estimates(active), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("branch", KINDS)
def test_layers_train_side_by_side_as_each_does_alone(branch: str) -> None:
    """Clipping, prunings and the optimizer of one layer know nothing of another."""
    config = PredictorConfig(steps=12, prune_every=4, neurons=0.6, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    seen = [together(examples(branch, 3, generator)) for _ in range(4)]
    torch.manual_seed(0)
    predictors = [KINDS[branch](D, (9, 8, 6)) for _ in range(3)]
    alone = [PredictorTraining([copy.deepcopy(p)], SIZE, config) for p in predictors]
    side_by_side = PredictorTraining(predictors, SIZE, config)
    for example in seen:
        side_by_side.see(example, 3)
        for layer, training in enumerate(alone):
            training.see(Example(example.x[layer : layer + 1], example.exact[layer : layer + 1]), 3)
    widths = set()
    for found, training in zip(side_by_side.finish(), alone, strict=True):
        (wanted,) = training.finish()
        assert widths_of({(0, branch): found}) == widths_of({(0, branch): wanted})
        widths |= {network.widths for network in found.by_name.values()}
        for key, value in found.state_dict().items():
            torch.testing.assert_close(value, wanted.state_dict()[key], rtol=1e-3, atol=1e-5)
    assert (9, 8, 6) not in widths


@pytest.mark.parametrize("every", [1, 2, 3, 5, 64])
def test_no_neuron_goes_that_nobody_has_counted(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of frequencies that are all 0 the last neurons would be the idlest."""
    counted = []
    monkeypatch.setattr(
        predictor_training, "prune", lambda _, counts, *__: (counted.append(counts.documents), counts.reset())
    )
    config = PredictorConfig(steps=20, prune_every=every)
    training = PredictorTraining([KINDS["mlp"](D, (6, 5, 4))], SIZE, config)
    training.see(Example(torch.randn(1, 40, D), torch.rand(1, 40)), steps=20)
    assert len(counted) == max(1, 15 // every)
    assert min(counted) > 0


def test_blocks_begin_anywhere() -> None:
    """Steps see documents from any of their parts on; a block of the parts' size would leave no choice."""
    torch.manual_seed(0)
    training = PredictorTraining([AttentionPredictor(D, (6, 5, 4))], 64, PredictorConfig(steps=40))
    starts = set()
    forward = training.stack.forward

    def watched(x: Tensor, blocks: Blocks, *args: Any) -> Any:
        starts.add((blocks.start, x.shape[1]))
        return forward(x, blocks, *args)

    training.stack.forward = watched  # type: ignore[method-assign]
    training.see(Example(torch.randn(1, 300, D), torch.rand(1, 19, 19).tril()), 40)
    assert starts == {(0.0, 300), (0.25, 284), (0.5, 268), (0.75, 252)}


def test_old_documents_are_forgotten_when_memory_is_full() -> None:
    (example,) = examples("mlp", 1, torch.Generator().manual_seed(0))
    example = together([example])
    size = 4 * (example.x.numel() + example.exact.numel())
    torch.manual_seed(0)
    training = PredictorTraining(
        [ActivityPredictor(D, (6, 5, 4))], SIZE, PredictorConfig(steps=9, memory_gib=2.5 * size / GIB)
    )
    held = []
    for _ in range(4):
        training.see(example, 1)
        held.append(len(training._memory))
    assert held == [1, 2, 2, 2]


@pytest.mark.parametrize("branch", KINDS)
def test_causal_scores_dont_look_ahead(branch: str) -> None:
    torch.manual_seed(0)
    predictor, x = KINDS[branch](D, (6, 5, 4)), torch.randn(45, D)
    blocks = Blocks(45, SIZE)
    changed = x.clone()
    changed[3 * SIZE :] += 1
    before, after = (predictor.informativeness(values, blocks, True) for values in (x, changed))
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=0)
    assert not torch.equal(before[4:], after[4:])
    looking = [predictor.informativeness(values, blocks, False) for values in (x, changed)]
    assert not torch.equal(looking[0][:4], looking[1][:4]) or branch == "mlp"


def test_activities_are_means_of_tokens() -> None:
    torch.manual_seed(0)
    predictor, x = ActivityPredictor(D, (6, 5, 4)), torch.randn(21, D)
    by_token = predictor.informativeness(x, Blocks(21, 1), False)
    layout = build_layout(1, 21, SIZE, torch.device("cpu"))
    found = predictor.informativeness(x, Blocks(21, SIZE), False)
    torch.testing.assert_close(found, mlp_informativeness(by_token, layout, causal=False))


@pytest.mark.parametrize("lengths", [(25, 35), (16, 16), (3, 40, 8, 1), (200, *(9 * [1]))])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("branch", KINDS)
def test_a_batch_is_its_documents(branch: str, causal: bool, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    predictor, x = measured(KINDS[branch](D, (6, 5, 4))), torch.randn(sum(lengths), D)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    layout = build_layout(1, sum(lengths), SIZE, torch.device("cpu"), position_ids=positions)
    parts = [predictor.informativeness(x[a:b], Blocks(b - a, SIZE), causal) for a, b in layout.documents]
    torch.testing.assert_close(predicted_scores(predictor, x, same, None, layout, causal), torch.cat(parts))


def test_autocast_changes_no_score() -> None:
    predictor, x = attention(), torch.randn(40, D)
    layout = build_layout(1, 40, SIZE, torch.device("cpu"))
    wanted = predicted_scores(predictor, x, same, None, layout, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predicted_scores(predictor, x, same, None, layout, False), wanted)


def test_half_precision_inputs() -> None:
    predictor, x = attention(), torch.randn(40, D)
    exact, half = (predictor.informativeness(v, Blocks(40, SIZE), False) for v in (x, x.bfloat16()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.01)


def examples(branch: str, count: int, generator: torch.Generator) -> list[Example]:
    """Of one layer; scores that three low-rank matrices can tell: a few directions of the input decide."""
    found = []
    for _ in range(count):
        loud = torch.rand(20, 1, generator=generator).repeat_interleave(SIZE, 0)
        x = torch.randn(20 * SIZE, D, generator=generator) * (0.3 + loud)
        strong = x[:, :2].clamp(min=0)
        if branch == "mlp":
            found.append(Example(x, 0.2 + strong.sum(1)))
        else:
            largest = strong.view(20, SIZE, 2).amax(1)
            found.append(Example(x, (0.1 + largest[:, :1] @ largest[:, 1:].T).tril()))
    return found


def together(of_layers: list[Example]) -> Example:
    return Example(torch.stack([e.x for e in of_layers]), torch.stack([e.exact for e in of_layers]))


@pytest.mark.parametrize("branch", KINDS)
def test_training_finds_the_blocks_that_count(branch: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = PredictorConfig(steps=300, neurons=0.9)
    training = PredictorTraining([KINDS[branch](D, (16, 16, 8))], SIZE, config)
    judged = examples(branch, 6, generator)

    def judge() -> float:
        blocks = Blocks(20 * SIZE, SIZE)
        (predictor,) = training.finish()
        found = [predictor.informativeness(e.x, blocks, False) for e in judged]
        return sum(recall(f, exact_of(e), 0.5) for f, e in zip(found, judged, strict=True)) / len(judged)

    def exact_of(example: Example) -> Tensor:
        if branch == "mlp":
            return Blocks(20 * SIZE, SIZE).mean(example.exact[:, None])[:, 0]
        return attention_informativeness(example.exact, False)

    for example in examples(branch, 60, generator):
        training.see(together([example]), 5)
    assert training.step == 300
    assert judge() >= 0.85, judge()


def test_recall() -> None:
    exact = torch.tensor([4.0, 3, 2, 1])
    assert recall(exact, exact, 0.5) == 1.0
    assert recall(-exact, exact, 0.5) == 0.0
    assert recall(torch.tensor([4.0, 1, 2, 3]), exact, 0.5) == 0.5
