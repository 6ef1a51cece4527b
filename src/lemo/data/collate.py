"""Rows of a dataset to the tensors of one forward pass.

Three shapes come out (B rows, T tokens of the longest, S tokens of all rows):
    one plain row            input_ids, labels [1, T]
    several plain rows       input_ids, labels, attention_mask [B, T], padded on the right
    packed rows              input_ids, labels, position_ids [1, S]; positions restart at each document

Packed rows get no attention_mask: restarting positions without one tell attention to keep documents apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lemo.data.labelling import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Callable for `Trainer(data_collator=...)` and `DataLoader(collate_fn=...)`.

    Args:
        pad_token_id: fills the rows; masked and unlabelled, so its value never matters to the loss.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Pads with the tokenizer's pad token, failing that its end-of-sequence token, failing that 0."""
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if isinstance(token, int):
                return cls(token)
        return cls(0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """int64 tensors; columns other than input_ids, labels and position_ids are left out."""
        if "position_ids" in rows[0]:
            return {
                key: torch.cat([_tensor(row[key]) for row in rows])[None]
                for key in ("input_ids", "labels", "position_ids")
            }
        ids = [_tensor(row["input_ids"]) for row in rows]
        labels = [_tensor(row["labels"]) for row in rows]
        if len(rows) == 1:
            return {"input_ids": ids[0][None], "labels": labels[0][None]}
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
        }


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)
