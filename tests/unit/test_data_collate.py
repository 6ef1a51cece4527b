"""Rows to tensors: padding, packing, and which keys are there at all."""

from __future__ import annotations

from itertools import chain

import torch
from transformers import DataCollatorWithFlattening

from lemo.data import Collator
from tiny_tokenizer import byte_tokenizer


def _row(*ids: int, labels: list[int] | None = None) -> dict[str, object]:
    return {"input_ids": list(ids), "labels": labels or [-100, *ids[1:]], "name": "x"}


def _packed(*lengths: int) -> dict[str, object]:
    documents = [[10 * number + position for position in range(n)] for number, n in enumerate(lengths, start=1)]
    return {
        "input_ids": list(chain(*documents)),
        "labels": list(chain(*([-100, *document[1:]] for document in documents))),
        "position_ids": list(chain(*map(range, lengths))),
        "name": "x + y",
    }


def test_one_row_has_no_mask() -> None:
    batch = Collator(0)([_row(5, 6, 7)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 6, 7]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_several_rows_are_padded_on_the_right() -> None:
    batch = Collator(9)([_row(5, 6, 7), _row(1), _row(3, 4)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 9, 9], [3, 4, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100], [-100, 4, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_pad_token_that_is_also_a_real_token_masks_no_real_token() -> None:
    batch = Collator(6)([_row(5, 6, 6), _row(6, 6)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 6], [-100, 6, -100]]


def test_a_packed_row_has_restarting_positions_and_no_mask() -> None:
    batch = Collator(0)([_packed(3, 2)])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_packed_rows_join_into_one() -> None:
    batch = Collator(0)([_packed(3, 2), _packed(4)])
    assert {tensor.shape for tensor in batch.values()} == {(1, 9)}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


def test_packed_rows_agree_with_transformers_flattening() -> None:
    rows = [_packed(3), _packed(4), _packed(2)]
    own = Collator(0)(rows)
    theirs = DataCollatorWithFlattening()([{"input_ids": row["input_ids"]} for row in rows])
    for key in ("input_ids", "position_ids", "labels"):
        assert own[key].tolist() == theirs[key].tolist()


def test_pad_token_and_its_fallbacks() -> None:
    padded = byte_tokenizer(pad=True)
    assert Collator.for_tokenizer(padded).pad_token_id == padded.convert_tokens_to_ids("<pad>")
    unpadded = byte_tokenizer()
    assert unpadded.pad_token_id is None
    assert Collator.for_tokenizer(unpadded).pad_token_id == unpadded.eos_token_id
    assert Collator.for_tokenizer(byte_tokenizer(eos=False)).pad_token_id == 0
