"""MLPs' predictors: their scores are means of their tokens'; none looks ahead where it mustn't."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lemo.selection import predictor_training
from lemo.selection.examples import GIB, Example
from lemo.selection.layout import build_layout
from lemo.selection.predictor import ActivityPredictor, activity_predictor_of, predicted_scores
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.predictor_stack import PredictorStack
from lemo.selection.predictor_training import PredictorTraining
from lemo.selection.score_errors import recall
from lemo.selection.scores import block_means, mlp_informativeness
from lemo.types import SequenceLayout

D, SIZE = 12, 8


def measured(widths: tuple[int, int] = (6, 5)) -> ActivityPredictor:
    predictor = ActivityPredictor(D, widths)
    predictor.center.normal_()
    predictor.spread.uniform_(0.5, 2.0)
    predictor.scale.fill_(0.3)
    return predictor


def packed(*lengths: int) -> SequenceLayout:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return build_layout(1, sum(lengths), SIZE, torch.device("cpu"), position_ids=positions)


def scored(
    predictor: ActivityPredictor, x: Tensor, causal: bool = False, layout: SequenceLayout | None = None
) -> Tensor:
    return predicted_scores(predictor, x, None, None, layout or packed(len(x)), causal)


def by_the_book(predictor: ActivityPredictor, x: Tensor) -> Tensor:
    """The tokens' activities in the scores' unit, matrix by matrix."""
    x = (x.double() - predictor.center) / predictor.spread
    for matrix in predictor.matrices:
        x = torch.relu(x @ matrix.double().T)
    return x[:, 0] * predictor.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_activities(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predictor, x = measured(), torch.randn(41, D).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    found = predictor.activity(x)
    torch.testing.assert_close(found.double(), by_the_book(predictor, x), **tolerance)
    # Other inputs' dtype: made anew.
    torch.testing.assert_close(predictor.activity(x.float()), found.float(), **tolerance)


def test_loaded_matrices_are_taken() -> None:
    torch.manual_seed(0)
    predictor, other, x = measured(), measured(), torch.randn(41, D)
    before = predictor.activity(x)
    predictor.load_state_dict(other.state_dict())
    assert torch.equal(predictor.activity(x), other.activity(x))
    assert not torch.equal(predictor.activity(x), before)
    assert predictor.double().activity(x.double()).dtype == torch.float64


def test_predictors_come_back_from_their_tensors() -> None:
    predictor, x = measured((7, 4)), torch.randn(41, D)
    state = predictor.state_dict()
    assert torch.equal(activity_predictor_of(state).activity(x), predictor.activity(x))
    for name in state:
        with pytest.raises((KeyError, RuntimeError)):
            activity_predictor_of({key: value for key, value in state.items() if key != name})


def test_a_stack_puts_out_what_each_layers_predictor_does() -> None:
    torch.manual_seed(0)
    predictors = [measured() for _ in range(3)]
    stack, x = PredictorStack(predictors), torch.randn(3, 41, D)
    found = stack(x).top
    for layer, predictor in enumerate(predictors):
        wanted = by_the_book(predictor, x[layer]) / predictor.scale
        torch.testing.assert_close(found[layer].double(), wanted, rtol=1e-5, atol=1e-6)


def test_layers_train_side_by_side_as_each_does_alone() -> None:
    """Clipping, prunings and the optimizer of one layer know nothing of another."""
    config = PredictorConfig(steps=12, prune_every=4, size=0.6, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    seen = [together(examples(3, generator)) for _ in range(4)]
    torch.manual_seed(0)
    predictors = [ActivityPredictor(D, (9, 8)) for _ in range(3)]
    alone = [PredictorTraining([copy.deepcopy(p)], SIZE, config) for p in predictors]
    side_by_side = PredictorTraining(predictors, SIZE, config)
    for example in seen:
        side_by_side.see(example, 3)
        for layer, training in enumerate(alone):
            training.see(Example(example.x[layer : layer + 1], example.exact[layer : layer + 1]), 3)
    for found, training in zip(side_by_side.finish(), alone, strict=True):
        (wanted,) = training.finish()
        assert [len(matrix) for matrix in found.matrices] == [5, 5, 1]
        for key, value in found.state_dict().items():
            torch.testing.assert_close(value, wanted.state_dict()[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 64])
def test_no_neuron_goes_that_nobody_has_counted(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of frequencies that are all 0 the last neurons would be the idlest."""
    counted = []
    monkeypatch.setattr(
        predictor_training, "prune", lambda _, counts, *__: (counted.append(counts.documents), counts.reset())
    )
    config = PredictorConfig(steps=20, prune_every=every)
    training = PredictorTraining([ActivityPredictor(D, (6, 5))], SIZE, config)
    training.see(Example(torch.randn(1, 40, D), torch.rand(1, 40)), steps=20)
    assert len(counted) == max(1, 15 // every)
    assert min(counted) > 0


def test_old_documents_are_forgotten_when_memory_is_full() -> None:
    example = together(examples(1, torch.Generator().manual_seed(0)))
    size = 4 * (example.x.numel() + example.exact.numel())
    torch.manual_seed(0)
    training = PredictorTraining(
        [ActivityPredictor(D, (6, 5))], SIZE, PredictorConfig(steps=9, memory_gib=2.5 * size / GIB)
    )
    held = []
    for _ in range(4):
        training.see(example, 1)
        held.append(len(training._memory))
    assert held == [1, 2, 2, 2]


def test_causal_scores_dont_look_ahead() -> None:
    torch.manual_seed(0)
    predictor, x = ActivityPredictor(D, (6, 5)), torch.randn(45, D)
    changed = x.clone()
    changed[3 * SIZE :] += 1
    before, after = (scored(predictor, values, causal=True) for values in (x, changed))
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=0)
    assert not torch.equal(before[4:], after[4:])


@pytest.mark.parametrize("tokens", [SIZE, 3, 21])
def test_scores_are_means_of_tokens(tokens: int) -> None:
    torch.manual_seed(0)
    predictor, x = measured(), torch.randn(tokens, D)
    activity = predictor.activity(x)
    wanted = mlp_informativeness(activity, packed(tokens), causal=False)
    torch.testing.assert_close(scored(predictor, x), wanted)
    torch.testing.assert_close(block_means(activity, SIZE), wanted)


@pytest.mark.parametrize("lengths", [(25, 35), (16, 16), (3, 40, 8, 1), (200, *(9 * [1]))])
@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_is_its_documents(causal: bool, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    predictor, x = measured(), torch.randn(sum(lengths), D)
    layout = packed(*lengths)
    parts = [scored(predictor, x[a:b], causal) for a, b in layout.documents]
    torch.testing.assert_close(scored(predictor, x, causal, layout), torch.cat(parts))


def test_autocast_changes_no_score() -> None:
    predictor, x = measured(), torch.randn(40, D)
    wanted = scored(predictor, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scored(predictor, x), wanted)


def test_half_precision_inputs() -> None:
    torch.manual_seed(0)
    predictor, x = measured(), torch.randn(40, D)
    half = scored(predictor, x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scored(predictor, x), rtol=0.05, atol=0.01)


def examples(count: int, generator: torch.Generator) -> list[Example]:
    """Of one layer; scores that three low-rank matrices can tell: a few directions of the input decide."""
    found = []
    for _ in range(count):
        loud = torch.rand(20, 1, generator=generator).repeat_interleave(SIZE, 0)
        x = torch.randn(20 * SIZE, D, generator=generator) * (0.3 + loud)
        found.append(Example(x, 0.2 + x[:, :2].clamp(min=0).sum(1)))
    return found


def together(of_layers: list[Example]) -> Example:
    return Example(torch.stack([e.x for e in of_layers]), torch.stack([e.exact for e in of_layers]))


def test_training_finds_the_blocks_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    training = PredictorTraining([ActivityPredictor(D, (16, 16))], SIZE, PredictorConfig(steps=300, size=0.9))
    judged = examples(6, generator)

    def judge() -> float:
        (predictor,) = training.finish()
        found = [scored(predictor, e.x) for e in judged]
        return sum(recall(f, block_means(e.exact, SIZE), 0.5) for f, e in zip(found, judged, strict=True)) / len(judged)

    for example in examples(60, generator):
        training.see(together([example]), 5)
    assert training.step == 300
    assert judge() >= 0.85, judge()


def test_recall() -> None:
    exact = torch.tensor([4.0, 3, 2, 1])
    assert recall(exact, exact, 0.5) == 1.0
    assert recall(-exact, exact, 0.5) == 0.0
    assert recall(torch.tensor([4.0, 1, 2, 3]), exact, 0.5) == 0.5
