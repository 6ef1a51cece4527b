"""What a run's configuration, model and data must agree on, checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from lemo.config import RunConfig
from lemo.errors import UserError
from lemo.selection.layout import build_layout
from lemo.selection.ranking import block_cap
from lemo.training.trainer import IGNORED


def check_length(model: Any, config: RunConfig) -> None:
    """Refuses sequences longer than the model has positions for.

    Raises:
        UserError: `data.max_tokens` is over the model's limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_tokens > limit:
        raise UserError(
            f"data.max_tokens is {config.data.max_tokens:,}, but {config.model.name} has {limit:,} positions; "
            f"set data.max_tokens to at most {limit} and data.overflow to say what happens to longer documents, or "
            "extend the model's context by model.rope_scaling"
        )


def check_labels_fit(rows: Iterable[Mapping[str, Any]], config: RunConfig) -> None:
    """Refuses data whose labelled blocks alone exceed `keep`, where they must all be kept (DESIGN 4.6).

    Args:
        rows: training sequences: input_ids, labels, name, and position_ids if packed.

    Raises:
        UserError: some document's do; the message gives three remedies.
    """
    sparsity = config.sparsity
    if sparsity.mode != "backward" or sparsity.policy == "segments" or sparsity.labelled != "always":
        return
    if sparsity.keep is None:
        return
    for row in rows:
        labels = torch.as_tensor(row["labels"])
        positions = torch.as_tensor(row["position_ids"])[None] if "position_ids" in row else None
        layout = build_layout(1, len(labels), sparsity.tokens_per_block, torch.device("cpu"), position_ids=positions)
        # A token's hidden state predicts its successor, so the block that counts is the one before the label.
        blocks = layout.block_of_row[:-1][labels[1:] != IGNORED].unique()
        labelled = torch.bincount(layout.document_of_block[blocks], minlength=len(layout.documents)).tolist()
        caps = block_cap(layout, sparsity.keep)
        for count, cap, total in zip(labelled, caps, layout.blocks_per_document, strict=True):
            if count > cap:
                raise UserError(
                    f"{row['name']}: {count} of its {total} blocks hold labels, but sparsity.keep={sparsity.keep:g} "
                    f"allows {cap}; raise sparsity.keep, or set sparsity.labelled=ranked to let labelled blocks "
                    "compete, or, where every token is labelled, leave keep out and set "
                    "sparsity.policy=segments"
                )


def fingerprint_model(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and first 256 numbers, the same for fp32 and bf16 copies of a model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        head = parameter.detach().flatten()[:256]
        if head.is_floating_point():
            head = head.to(torch.bfloat16).view(torch.int16)
        digest.update(head.cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_data(train: Dataset) -> str:
    """A hash of every training sequence's tokens, labels and positions, in order."""
    digest = hashlib.sha256()
    for row in train.with_format("numpy"):
        for key in sorted(row.keys() & {"input_ids", "labels", "position_ids"}):
            digest.update(f"{key} {len(row[key])} ".encode())
            digest.update(row[key].astype("int64").tobytes())
    return digest.hexdigest()
