"""Baselines that lemo is compared with: LongLoRA's shifted attention, sequences cut short, and runs that end early.

Shapes: B batch, T tokens, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo.bench.config import GROUPS
from lemo.data.labelling import IGNORED
from lemo.errors import UserError
from lemo.models import get_runtime

_SHIFTED = "lemo_shifted_"


def shift_attention(model: Any, groups: int = GROUPS) -> None:
    """LongLoRA's shifted sparse attention (S²-Attn, arXiv 2309.12307) while the model trains; evaluation stays dense.

    Groups have ceil(T / groups) tokens. The first half of the heads attends within groups, the second half within
    groups shifted by half a group; causally. The original rolls the sequence for the second half, so that its first
    tokens share a group with its last ones and see them. Here they don't: the shifted heads' first half group stands
    alone, and so does what is left at the end.

    Training takes unpadded, unpacked sequences that fit any sliding window; others are refused when they come.

    Args:
        model: transformers CausalLM, or a PEFT model around one, or either sparsified with mode `dense`. Changed in
            place; `unshift_attention` undoes it.
        groups: how many a sequence is cut into (the paper: 4).

    Raises:
        ValueError: fewer than one group, attention other than sdpa (shifted already, for one), or a model that leaves
            tokens out, whose backward recomputes dense attention.
    """
    runtime = get_runtime(model)
    implementation = model.config._attn_implementation
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if implementation != "sdpa":
        raise ValueError(f"shifted attention takes the place of sdpa, this model's is {implementation}")
    if runtime is not None and (runtime.config.mode != "dense" or runtime.config.attend is not None):
        raise ValueError(
            f"shifted attention needs sparsity mode dense without attend, this model's is {runtime.config.mode}"
        )
    name = f"{_SHIFTED}{groups}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_shifted_attention, groups=groups))
    # No mask at all for a plain causal sequence; otherwise one that training refuses and evaluation needs.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    # The decoder and all its attention modules hold this configuration.
    model.config._attn_implementation = name


def unshift_attention(model: Any) -> None:
    """Undoes `shift_attention` exactly.

    Raises:
        ValueError: the model's attention isn't shifted.
    """
    if not model.config._attn_implementation.startswith(_SHIFTED):
        raise ValueError("this model's attention isn't shifted; there is nothing to undo")
    model.config._attn_implementation = "sdpa"


def _shifted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    groups: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: query [B, H, T, d], key and value [B, K, T, d] to [B, T, H, d]."""
    if not module.training:
        dense = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return dense(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _, H, T, _ = query.shape
    _refuse_other_than_plain(module, attention_mask, key.shape[2] != T, kwargs)
    size = -(-T // groups)
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    halves = [
        _attend_in_groups(query[:, heads], key[:, heads], value[:, heads], size, first, scaling, dropout)
        for heads, first in ((slice(H // 2), 0), (slice(H // 2, H), size // 2))
    ]
    return torch.cat(halves, dim=1).transpose(1, 2).contiguous(), None


def _refuse_other_than_plain(module: Any, mask: Tensor | None, cached: bool, kwargs: dict[str, Any]) -> None:
    """Raises a UserError for anything but one causal sequence a row."""
    positions = kwargs.get("position_ids")
    # transformers ignores packing where it makes a cache. One layer looks: it makes the device wait.
    packed = module.layer_idx == 0 and positions is not None and bool((positions.diff(dim=-1) != 1).any())
    if mask is not None or cached or packed:
        raise UserError(
            "shifted attention trains on one unpadded sequence a row, without packed documents, a filled cache, or a "
            "sliding window that cuts it; set training.batch_size=1, leave packing out, and take a model without window"
        )


def _attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, size: int, first: int, scaling: float | None, dropout: float
) -> Tensor:
    """Causal attention within a first group of `first` tokens, groups of `size`, and one of the rest: [B, h, T, d]."""
    B, _, T, _ = query.shape
    whole = (T - first) // size
    end = first + whole * size
    parts = []
    for start, stop, count in ((0, first, 1), (first, end, whole), (end, T, 1)):
        if start == stop:
            continue
        # Groups of one size become a batch.
        q, k, v = (
            x[:, :, start:stop].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        parts.append(out.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)


def truncate_rows(train: Dataset, keep: float, seed: int) -> Dataset:
    """Every sequence cut to a share of its tokens: what training on shorter inputs would do with the same data.

    A row with labels in the first half of its predicted tokens counts as labelled everywhere: a random stretch is
    kept, and its first token loses its label, since nothing predicts it. Any other row keeps its end, and with it
    every label and the token that predicts the first.

    Args:
        train: rows of input_ids, labels (-100 at tokens without one) and name.
        keep: share of tokens, in (0, 1].
        seed: with the row's name, decides the stretch.

    Raises:
        ValueError: what is kept of a row holds no label.
    """
    rows = [_truncated(row, keep, seed) for row in train]
    return Dataset.from_list(rows, features=train.features)


def _truncated(row: Any, keep: float, seed: int) -> dict[str, Any]:
    ids, labels, name = row["input_ids"], list(row["labels"]), row["name"]
    T = len(ids)
    kept = round(keep * T)
    # A first token's label counts for nothing: nothing predicts it.
    labelled = next((t for t in range(1, T) if labels[t] != IGNORED), T)
    if labelled <= (T - 1) // 2:
        kept = max(kept, 2)
        start = random.Random(f"{seed} {name}").randrange(T - kept + 1)
    else:
        kept = max(kept, T - labelled + 1)
        start = T - kept
    ids, labels = ids[start : start + kept], labels[start : start + kept]
    labels[0] = IGNORED
    if all(label == IGNORED for label in labels):
        raise ValueError(f"{name}: no label is left in the {kept} tokens kept of {T}; label the end, or every token")
    return {"input_ids": ids, "labels": labels, "name": name}


class StopEarly(TrainerCallback):
    """Ends a run after a share of its steps, whose learning rates stay those of the whole run.

    Args:
        share: of the steps, in (0, 1]; to the nearest, one at least.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimizer step."""
        control.should_training_stop |= state.global_step >= round(self.share * state.max_steps)
