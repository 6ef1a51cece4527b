"""Answers are judged as unmodified transformers' full logits would judge them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lemo.models
from lemo.config import SparsityConfig
from lemo.evaluation import Answer, accuracy, by_depth, retrieval_answers
from tiny import VOCAB, build, causal_lm

T = 40
SPANS = ([(9, 12), (20, 21), (38, 40)], [(1, 3), (30, 34)])


def _predicted(model: nn.Module, ids: list[int]) -> list[int]:
    """Token that the full logits put at each position, from the one before; the first has none."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return [-100, *logits[0, :-1].argmax(-1).tolist()]


def _rows(model: nn.Module, wrong: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """Random rows whose labels are the model's own words, but for one token of the answers (row, answer) in `wrong`."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number, spans in enumerate(SPANS):
        ids = torch.randint(3, VOCAB, (T,), generator=generator).tolist()
        predicted, labels = _predicted(model, ids), [-100] * T
        for answer, (start, end) in enumerate(spans):
            labels[start:end] = predicted[start:end]
            if (number, answer) in wrong:
                labels[end - 1] = (labels[end - 1] + 1) % VOCAB
        rows.append(
            {
                "input_ids": ids,
                "labels": labels,
                "answer_start": [start for start, _ in spans],
                "answer_end": [end for _, end in spans],
                "depth": [answer / 4 for answer in range(len(spans))],
                "length": T,
            }
        )
    return rows


@pytest.mark.parametrize("wrong", [set(), {(0, 0)}, {(0, 1), (0, 2), (1, 1)}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "opt-350m"])
def test_an_answer_is_right_if_every_token_is_the_most_likely(family: str, wrong: set[tuple[int, int]]) -> None:
    model = build(family).eval()
    rows = _rows(model, wrong)
    answers = retrieval_answers(model, rows, "cpu")
    expected = [(T, k / 4, (n, k) not in wrong) for n, spans in enumerate(SPANS) for k in range(len(spans))]
    assert [(a.length, a.depth, a.right) for a in answers] == expected
    assert accuracy(answers) == 1 - len(wrong) / 5


def test_the_head_sees_the_answers_rows_only_and_modes_are_restored() -> None:
    model = build("llama", lora_dropout=0.5)
    causal_lm(model).model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    rows = _rows(model.eval(), set())
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    seen: list[int] = []
    causal_lm(model).lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    answers = retrieval_answers(model, rows, "cpu")
    assert all(answer.right for answer in answers), "dropout is off"
    assert seen == [6, 6]
    assert [module.training for module in model.modules()] == modes


def test_a_sparsified_model_is_judged_dense_unless_the_caller_asks() -> None:
    model = build("llama").eval()
    rows = _rows(model, set())
    config = SparsityConfig(mode="forward", keep=0.4, block_size=6)
    lemo.models.sparsify(model, config)
    assert accuracy(retrieval_answers(model, rows, "cpu")) == 1
    with lemo.models.sparse_evaluation(model):
        sparse = retrieval_answers(model, rows, "cpu")
        predicted = [_predicted(model, row["input_ids"]) for row in rows]
    right = [
        predicted[n][start:end] == rows[n]["labels"][start:end] for n, spans in enumerate(SPANS) for start, end in spans
    ]
    assert [answer.right for answer in sparse] == right
    assert not all(right)


@pytest.mark.parametrize("span", [(0, 3), (38, 41), (5, 5)])
def test_answers_outside_their_row(span: tuple[int, int]) -> None:
    model = build("llama")
    row = {"input_ids": [3] * T, "labels": [3] * T, "length": T, "depth": [0.5]}
    row |= {"answer_start": [span[0]], "answer_end": [span[1]]}
    with pytest.raises(ValueError, match="don't lie inside a row of 40 tokens"):
        retrieval_answers(model, [row], "cpu")


def test_accuracy_by_length_and_depth() -> None:
    answers = [Answer(64, 0.0, True), Answer(64, 0.49, False), Answer(64, 1.0, True), Answer(32, 0.5, True)]
    assert accuracy(answers) == 0.75
    cells = [(c["length"], c["depth_start"], c["depth_end"], c["answers"], c["accuracy"]) for c in by_depth(answers, 2)]
    assert cells == [(32, 0.0, 0.5, 0, None), (32, 0.5, 1.0, 1, 1.0), (64, 0.0, 0.5, 2, 0.5), (64, 0.5, 1.0, 1, 1.0)]


def test_no_answers_and_no_bins() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy(())
    with pytest.raises(ValueError, match="depths >= 1"):
        by_depth([Answer(1, 0.0, True)], 0)
    assert by_depth((), 3) == []
