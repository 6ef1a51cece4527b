"""One greedy completion of a held-out example, to look at beside what the document really says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lemo.evaluation.modes import training_mode

IGNORED = -100
TAIL_TOKENS = 64


class Sample(TypedDict):
    """End of the prompt, the document's own continuation, and the model's, as text."""

    prompt_tail: str
    reference: str
    completion: str


def sample_completion(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], n_tokens: int
) -> Sample:
    """Continues an example's prompt greedily, with the dense model.

    The prompt is what comes before the first label. Where every token is labelled it is all but the last `n_tokens`.

    Args:
        model: CausalLM, sparsified or not, PEFT or not; its train/eval modes and the random state are untouched.
        tokenizer: the model's.
        example: `input_ids` and `labels`, [T] each; of a packed row the first document is used.
        n_tokens: most tokens to generate, at least 1.

    Raises:
        ValueError: `n_tokens` under 1, or an example of fewer than two tokens.
    """
    ids, labels = (torch.as_tensor(example[key], dtype=torch.int64).flatten() for key in ("input_ids", "labels"))
    if "position_ids" in example:
        first = _first_document(torch.as_tensor(example["position_ids"]).flatten())
        ids, labels = ids[:first], labels[:first]
    if n_tokens < 1 or len(ids) < 2:
        raise ValueError(f"need n_tokens >= 1 and an example of at least 2 tokens, got {n_tokens} and {len(ids)}")
    start, end = _labelled_span(labels.tolist())
    if start < 2:
        start, end = max(1, len(ids) - n_tokens), len(ids)
    prompt = ids[None, :start].to(next(model.parameters()).device)
    generator: Any = model
    with training_mode(model, False), torch.no_grad():
        out = generator.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            # A generation config may carry sampling settings, which greedy decoding would warn about.
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )

    def text(tokens: torch.Tensor) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    return Sample(
        prompt_tail=text(ids[max(0, start - TAIL_TOKENS) : start]),
        reference=text(ids[start : min(end, start + n_tokens)]),
        completion=text(out[0, start:]),
    )


def _first_document(positions: torch.Tensor) -> int:
    """Tokens before the positions restart."""
    restarts = (positions[1:] <= positions[:-1]).nonzero()
    return int(restarts[0]) + 1 if len(restarts) else len(positions)


def _labelled_span(labels: list[int]) -> tuple[int, int]:
    """The first run of labels as [start, end); (0, 0) without any."""
    start = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    return start, end
