"""Held-out loss of the dense model: overall, by document, and by position in the document.

The loss is a mean over labelled tokens, not over documents, so that it equals what training minimises. Positions
are those of the predicted token in its own document, so padding and packing don't shift them.

Shapes: B rows, T tokens, M predictions: B·(T-1) rows of hidden states, each with the token that follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.errors import UserError
from lemo.evaluation.modes import training_mode
from lemo.loss import token_losses
from lemo.models import backbone_hidden
from lemo.models.attention_plans import attention_for

IGNORED = -100


@dataclass(frozen=True)
class DocumentLoss:
    """One document: its name in the dataset (or its index), labelled tokens, and mean loss (None without labels)."""

    name: str
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class BucketLoss:
    """Labelled tokens at positions [start, end) of their documents, and their mean loss (None without any)."""

    start: int
    end: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        loss: mean negative log-likelihood over all labelled tokens, nats.
        perplexity: exp(loss).
        tokens: labelled tokens.
        documents: per document, in the dataset's order.
        by_position: per bucket of positions, ascending.
    """

    loss: float
    perplexity: float
    tokens: int
    documents: tuple[DocumentLoss, ...]
    by_position: tuple[BucketLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return asdict(self) | {
            "documents": [asdict(document) for document in self.documents],
            "by_position": [asdict(bucket) for bucket in self.by_position],
        }


def evaluate(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]] | Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    documents: int,
    buckets: int,
    device: str | torch.device,
    max_tokens: int,
) -> EvaluationResult:
    """Loss of the dense model on the first documents of a dataset, one at a time, without T×V logits.

    Args:
        model: supported CausalLM on `device`, sparsified or not, PEFT or not; its train/eval modes are restored.
        dataset: indexable rows of `input_ids`, `labels`, optionally `position_ids` and `name`.
        collate: rows to tensors [B, T], as for the training.
        documents: rows evaluated (all, if fewer).
        buckets: how many equal position buckets [0, max_tokens) is cut into.
        device: where the tensors go.
        max_tokens: longest sequence; the last bucket grows if a row is longer.

    Raises:
        UserError: there is no document, none has a labelled token, or there are more buckets than positions.
        ValueError: `documents` or `buckets` under 1.
    """
    if documents < 1 or buckets < 1:
        raise ValueError(f"need documents >= 1 and buckets >= 1, got {documents} and {buckets}")
    if buckets > max_tokens:
        raise UserError(f"evaluation.buckets ({buckets}) can't exceed data.max_tokens ({max_tokens}); lower it")
    count = min(documents, len(dataset))
    if count == 0:
        raise UserError("there are no held-out documents to evaluate; set data.heldout or raise data.heldout_share")
    edges = [max_tokens * i // buckets for i in range(buckets + 1)]
    inner_edges = torch.tensor(edges[1:-1], dtype=torch.int64)
    sums = torch.zeros(buckets, dtype=torch.float64)
    counts = torch.zeros(buckets, dtype=torch.int64)
    results: list[DocumentLoss] = []
    longest = max_tokens
    with training_mode(model, False), torch.no_grad(), attention_for(model.config, max_tokens):
        for index in range(count):
            row = dataset[index]
            losses_M, positions_M = _row_losses(model, collate([row]), device)
            bucket_M = torch.bucketize(positions_M, inner_edges, right=True)
            sums.index_add_(0, bucket_M, losses_M)
            counts += torch.bincount(bucket_M, minlength=buckets)
            longest = max(longest, int(positions_M.max()) + 1) if positions_M.numel() else longest
            tokens = losses_M.numel()
            name = str(row.get("name", index))
            results.append(DocumentLoss(name, tokens, _mean(float(losses_M.sum()), tokens)))
    tokens = int(counts.sum())
    loss = _mean(float(sums.sum()), tokens)
    if loss is None:
        raise UserError(
            f"none of the {count} held-out documents evaluated has a labelled token; check their labels, or raise "
            "evaluation.documents"
        )
    edges[-1] = longest
    by_position = tuple(
        BucketLoss(edges[i], edges[i + 1], int(counts[i]), _mean(float(sums[i]), int(counts[i])))
        for i in range(buckets)
    )
    return EvaluationResult(loss, _perplexity(loss), tokens, tuple(results), by_position)


def compare_positions(before: Sequence[BucketLoss], after: Sequence[BucketLoss]) -> list[dict[str, Any]]:
    """Losses of the same buckets at two moments, as plain values: start, end, tokens, before, after."""
    return [
        {"start": old.start, "end": old.end, "tokens": old.tokens, "before": old.loss, "after": new.loss}
        for old, new in zip(before, after, strict=True)
    ]


def _row_losses(model: nn.Module, batch: dict[str, Tensor], device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Losses (fp64) and positions (int64) of a batch's labelled tokens, both on the CPU."""
    inputs = {key: value.to(device) for key, value in batch.items()}
    labels_BT = inputs.pop("labels")
    positions_BT = _positions(inputs)
    hidden_BTD, head = backbone_hidden(model, **inputs)
    # A row predicts its successor: the last has none, and the first token isn't predicted.
    hidden_MD = hidden_BTD[:, :-1].flatten(0, 1)
    labels_M = labels_BT[:, 1:].flatten()
    labelled = (labels_M != IGNORED).cpu()
    losses_M = token_losses(hidden_MD, head, labels_M).cpu().double()
    return losses_M[labelled], positions_BT[:, 1:].flatten().cpu()[labelled]


def _positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """Each token's position in its document, int64 [B, T]."""
    if "position_ids" in inputs:
        return inputs["position_ids"]
    mask = inputs.get("attention_mask")
    if mask is not None:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    ids = inputs["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _perplexity(loss: float) -> float:
    """exp(loss), at most the largest float: JSON has no infinity."""
    return math.exp(min(loss, 709.0))
