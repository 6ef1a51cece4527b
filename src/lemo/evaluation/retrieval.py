"""Whether a model finds facts in a long text: accuracy of its answers, by length and by the facts' depth.

Shapes: T tokens of a row, A tokens of its answers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.evaluation.modes import training_mode
from lemo.models import backbone_hidden
from lemo.models.attention_plans import attention_for


@dataclass(frozen=True)
class Answer:
    """One question: tokens of its row, place of the fact in the text in [0, 1], and whether the answer is right."""

    length: int
    depth: float
    right: bool


def retrieval_answers(
    model: nn.Module, rows: Sequence[Mapping[str, Any]] | Any, device: str | torch.device
) -> tuple[Answer, ...]:
    """Judges every answer of every row with the dense model (in `lemo.models.sparse_evaluation`: the sparse one).

    Teacher-forced, in one pass a row: an answer is right if the most likely token at each of its positions is the
    label. Where a row's earlier answers are right, that is the same as greedy decoding giving exactly the answer;
    after a wrong one, decoding would go on from the model's own words, and this goes on from the right ones. The
    head runs on the answers' positions only, so T×V logits never exist.

    Args:
        model: supported CausalLM on `device`, sparsified or not, PEFT or not; its train/eval modes are restored.
        rows: with `input_ids`, `labels`, `answer_start`, `answer_end` and `depth` (one an answer), `length`.
        device: where the tensors go.

    Returns:
        The answers, row by row, in the order of the questions.

    Raises:
        ValueError: an answer isn't inside its row, or starts it (nothing precedes the first token).
    """
    answers: list[Answer] = []
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    with training_mode(model, False), torch.no_grad(), attention_for(model.config, longest):
        for row in rows:
            spans = list(zip(row["answer_start"], row["answer_end"], strict=True))
            if any(not 0 < start < end <= len(row["input_ids"]) for start, end in spans):
                raise ValueError(f"answers at {spans} don't lie inside a row of {len(row['input_ids'])} tokens")
            right_A = iter(_right_tokens(model, row, spans, device).tolist())
            for (start, end), depth in zip(spans, row["depth"], strict=True):
                tokens = [next(right_A) for _ in range(start, end)]
                answers.append(Answer(int(row["length"]), float(depth), all(tokens)))
    return tuple(answers)


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of right answers.

    Raises:
        ValueError: there are none.
    """
    if not answers:
        raise ValueError("accuracy of no answers")
    return sum(answer.right for answer in answers) / len(answers)


def by_depth(answers: Sequence[Answer], depths: int) -> list[dict[str, Any]]:
    """Accuracy per length, ascending, and per equal bin of depth.

    Args:
        answers: of any lengths.
        depths: bins that [0, 1] is cut into; the last one includes 1.

    Returns:
        One `{length, depth_start, depth_end, answers, accuracy}` a cell; accuracy is None without answers.

    Raises:
        ValueError: `depths` under 1.
    """
    if depths < 1:
        raise ValueError(f"need depths >= 1, got {depths}")
    cells = []
    for length in sorted({answer.length for answer in answers}):
        for index in range(depths):
            inside = [a for a in answers if a.length == length and min(int(a.depth * depths), depths - 1) == index]
            cells.append(
                {
                    "length": length,
                    "depth_start": index / depths,
                    "depth_end": (index + 1) / depths,
                    "answers": len(inside),
                    "accuracy": accuracy(inside) if inside else None,
                }
            )
    return cells


def _right_tokens(
    model: nn.Module, row: Mapping[str, Any], spans: Sequence[tuple[int, int]], device: str | torch.device
) -> Tensor:
    """Whether each token of each answer is the most likely one, bool [A]."""
    positions = [position for start, end in spans for position in range(start, end)]
    labels_A = torch.tensor([row["labels"][position] for position in positions], dtype=torch.int64, device=device)
    ids_1T = torch.as_tensor(row["input_ids"], dtype=torch.int64, device=device)[None]
    hidden_1TD, head = backbone_hidden(model, input_ids=ids_1T)
    # A token is predicted by the one before it.
    before_A = torch.tensor(positions, dtype=torch.int64, device=device) - 1
    return head(hidden_1TD[0, before_A]).argmax(-1) == labels_A
