"""Tokens and labels of each kind of document."""

from __future__ import annotations

import numpy as np
import pytest

from lemo.data.documents import Document
from lemo.data.jsonl import Pair
from lemo.data.labelling import Encoded, Encoder, make_labels, tail_labelled
from lemo.errors import UserError
from tiny_tokenizer import byte_tokenizer


def _encode(tokenizer, *contents) -> list[Encoded | None]:  # type: ignore[no-untyped-def]
    documents = [Document(f"d{index}", f"d{index}", content=content) for index, content in enumerate(contents)]
    return list(Encoder(tokenizer).encode(documents))


@pytest.mark.parametrize(
    ("tokens", "completion", "first"),
    [
        (10, 0, 1),
        (10, 3, 7),
        (10, 8, 2),
        (10, 9, 1),
        (10, 10, 1),
        (10, 11, 1),
        (10, 500, 1),
        (2, 1, 1),
        (1, 1, 1),
        (1, 0, 1),
    ],
)
def test_tail_labels_start_at_the_completion_and_never_at_the_first_token(
    tokens: int, completion: int, first: int
) -> None:
    assert tail_labelled(tokens, completion).tolist() == [index >= first for index in range(tokens)]


def test_make_labels_never_labels_the_first_token() -> None:
    labels = make_labels(np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    assert labels.tolist() == [-100, -100, 7]


def test_plain_text_tokens_are_the_tokenizers_own() -> None:
    for bos in (False, True):
        tokenizer = byte_tokenizer(bos=bos)
        (encoded,) = _encode(tokenizer, "héllo")
        assert encoded is not None
        assert encoded.ids.tolist() == tokenizer("héllo")["input_ids"]
        assert len(encoded.ids) == 6 + bos
        assert encoded.labelled is None


def test_white_space_only_text_is_reported_as_none_in_its_place() -> None:
    encoded = _encode(byte_tokenizer(), "a", " \n\t", "", "b")
    assert [None if document is None else document.name for document in encoded] == ["d0", None, None, "d3"]


@pytest.mark.parametrize("bos", [False, True])
def test_pair_labels_the_completion_and_its_end_token_only(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    (encoded,) = _encode(tokenizer, Pair("ask: ", "yes"))
    assert encoded is not None
    assert encoded.labelled is not None
    assert encoded.prompt_tokens == 5 + bos
    assert encoded.labelled.tolist() == [False] * (5 + bos) + [True] * 4
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids[encoded.labelled][:-1]) == "yes"


def test_pair_is_tokenized_apart_even_where_the_border_would_merge() -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    (encoded,) = _encode(tokenizer, Pair("xa", "by"))
    assert encoded is not None
    assert len(tokenizer("xaby")["input_ids"]) == 3
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()) == ["x", "a", "b", "y", "<|im_end|>"]


def test_pair_without_an_end_token() -> None:
    with pytest.raises(UserError, match=r"end-of-sequence token.*set tokenizer\.eos_token"):
        _encode(byte_tokenizer(eos=False), Pair("a", "b"))


def test_kinds_mix_and_keep_their_order() -> None:
    encoded = _encode(byte_tokenizer(), "one", Pair("p", "cc"), "three")
    assert [len(document.ids) for document in encoded if document] == [3, 4, 5]


def test_batches_do_not_change_the_result() -> None:
    documents = [Document(f"d{index}", "", content="x" * (index + 1)) for index in range(7)]
    encoder = Encoder(byte_tokenizer())
    assert [len(d.ids) for d in encoder.encode(documents, at_most=2) if d] == [1, 2, 3, 4, 5, 6, 7]


def test_a_long_document_gives_no_tokenizer_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    with caplog.at_level("WARNING"):
        _encode(tokenizer, "a" * 100)
    assert not caplog.records
