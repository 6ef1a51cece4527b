"""`lemo eval`: the held-out loss of a model, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo.config import RunConfig
from lemo.data import Collator, SplitAccount, load_heldout
from lemo.evaluation.perplexity import EvaluationResult, evaluate
from lemo.models.device import choose_device
from lemo.models.loading import load_adapter, load_model


@dataclass(frozen=True)
class ModelEvaluation:
    """What `evaluate_model` found.

    Attributes:
        model: its name.
        adapter: directory of the adapter, if one was loaded.
        result: losses.
        data: what became of the held-out documents.
    """

    model: str
    adapter: str | None
    result: EvaluationResult
    data: SplitAccount

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"model": self.model, "adapter": self.adapter, **self.result.to_dict(), "data": self.data.as_dict()}

    def lines(self) -> list[str]:
        """For a person: the total, then one line a bucket of positions."""
        result = self.result
        total = (
            f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, over {result.tokens:,} labelled tokens of "
            f"{len(result.documents)} of {self.data.documents} held-out documents"
        )
        buckets = [
            f"  positions {bucket.start:,} to {bucket.end - 1:,}: loss {bucket.loss:.4f} ({bucket.tokens:,} tokens)"
            for bucket in result.by_position
            if bucket.loss is not None
        ]
        return [total, *buckets]


def evaluate_model(config: RunConfig, adapter: Path | None = None) -> ModelEvaluation:
    """Dense held-out loss of a model.

    Args:
        config: `model`, `data` (its held-out part is read), `evaluation` and `device` are used.
        adapter: directory in PEFT's format.

    Raises:
        UserError: no such model, adapter or data, or an adapter of another model.
    """
    device = choose_device(config.device)
    model, tokenizer = load_model(config.model, device)
    if adapter is not None:
        model = load_adapter(model, adapter).eval()
    rows, account = load_heldout(config.data, tokenizer)
    result = evaluate(
        model,
        rows,
        Collator.for_tokenizer(tokenizer),
        documents=max(config.evaluation.documents, 1),
        buckets=config.evaluation.buckets,
        device=device,
        max_tokens=config.data.max_tokens,
    )
    return ModelEvaluation(config.model.name, str(adapter) if adapter else None, result, account)
