"""Cutting, packing and the books that must balance."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lemo.config import DataConfig
from lemo.data.account import SplitAccount
from lemo.data.labelling import Encoded
from lemo.data.sequences import Sequence, build_sequences, pack, pack_sequences
from lemo.errors import UserError


def _text(tokens: int) -> Encoded:
    return Encoded("doc", "dir/doc", "digest", np.arange(tokens, dtype=np.int32))


def _labelled(*labelled: int, prompt_tokens: int | None = None) -> Encoded:
    mask = np.array(labelled, dtype=bool)
    return Encoded("doc", "dir/doc", "digest", np.arange(len(mask), dtype=np.int32), mask, prompt_tokens)


def _pair(prompt: int, completion: int) -> Encoded:
    return _labelled(*[0] * prompt, *[1] * completion, prompt_tokens=prompt)


def _build(document: Encoded, **settings: object) -> tuple[list[Sequence], SplitAccount]:
    account = SplitAccount(found=1)
    return build_sequences(document, DataConfig(**settings), account), account  # type: ignore[arg-type]


def _labels(sequence: Sequence) -> list[int]:
    return np.flatnonzero(sequence.labels != -100).tolist()


def test_a_document_of_exactly_the_limit_is_untouched() -> None:
    (sequence,), account = _build(_text(8), max_tokens=8)
    assert sequence.ids.tolist() == list(range(8))
    assert sequence.labels.tolist() == [-100, *range(1, 8)]
    assert (account.tokens_read, account.tokens, account.labelled_tokens) == (8, 8, 7)


def test_overflow_error_names_document_length_limit_and_settings() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: 9 tokens, over data\.max_tokens 8; .*truncate .*split .*drop"):
        _build(_text(9), max_tokens=8)


def test_truncate_keeps_the_end() -> None:
    (sequence,), account = _build(_text(11), max_tokens=8, overflow="truncate", completion_tokens=2)
    assert sequence.ids.tolist() == list(range(3, 11))
    assert sequence.labels.tolist() == [-100] * 6 + [9, 10]
    assert (account.truncated.documents, account.truncated.tokens, account.tokens) == (1, 3, 8)


def test_truncate_cuts_the_prompt_from_the_left() -> None:
    (sequence,), account = _build(_pair(7, 4), max_tokens=8, overflow="truncate")
    assert sequence.ids.tolist() == list(range(3, 11))
    assert _labels(sequence) == [4, 5, 6, 7]
    assert (account.truncated.tokens, account.labels_lost) == (3, 0)


def test_truncate_to_a_completion_that_just_fits_loses_its_first_label_and_says_so() -> None:
    (sequence,), account = _build(_pair(7, 8), max_tokens=8, overflow="truncate")
    assert _labels(sequence) == list(range(1, 8))
    assert (account.labelled_tokens, account.labels_lost) == (7, 1)


def test_truncate_refuses_a_completion_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: its completion alone has 9 tokens, over data\.max_tokens 8"):
        _build(_pair(1, 9), max_tokens=8, overflow="truncate")


def test_truncate_that_leaves_no_label_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: no label is left in its last 8 tokens; raise data\.max_tokens"):
        _build(_labelled(1, 1, 1, *[0] * 8), max_tokens=8, overflow="truncate")


def test_truncated_conversation_counts_the_labels_it_lost() -> None:
    _, account = _build(_labelled(1, 1, 0, 0, 1, 1), max_tokens=3, overflow="truncate")
    assert (account.labelled_tokens, account.labels_lost) == (2, 1)  # the first of all never was a label


def test_a_document_without_labels_is_an_error_even_if_it_fits() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: every label is masked"):
        _build(_labelled(1, 0, 0), max_tokens=8)


def test_a_single_token_is_an_error_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: a single token.*data\.min_tokens to 2"):
        _build(_text(1), max_tokens=8)
    assert _build(_text(1), max_tokens=8, min_tokens=2)[1].short.documents == 1


def test_split_is_consecutive_and_every_piece_has_its_own_tail() -> None:
    sequences, account = _build(_text(21), max_tokens=8, overflow="split", completion_tokens=3)
    assert [sequence.name for sequence in sequences] == ["doc#1/3", "doc#2/3", "doc#3/3"]
    assert np.concatenate([sequence.ids for sequence in sequences]).tolist() == list(range(21))
    assert [_labels(sequence) for sequence in sequences] == [[5, 6, 7], [5, 6, 7], [2, 3, 4]]
    assert (account.split.documents, account.split.tokens, account.pieces) == (1, 21, 3)


@pytest.mark.parametrize(("tokens", "lengths"), [(16, [8, 8]), (17, [8, 7, 2]), (18, [8, 8, 2]), (9, [7, 2])])
def test_split_leaves_no_single_token(tokens: int, lengths: list[int]) -> None:
    sequences, account = _build(_text(tokens), max_tokens=8, overflow="split")
    assert [len(sequence.ids) for sequence in sequences] == lengths
    assert account.tokens == tokens


def test_split_cuts_given_labels_and_counts_those_lost_at_a_piece_s_start() -> None:
    sequences, account = _build(_labelled(0, 1, 1, 1, 1, 1), max_tokens=3, overflow="split")
    assert [_labels(sequence) for sequence in sequences] == [[1, 2], [1, 2]]
    assert (account.labelled_tokens, account.labels_lost) == (4, 1)


def test_split_with_a_piece_without_labels_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^dir/doc: piece 1 of 3 \(tokens 1 to 8\) holds no label; .*truncate"):
        _build(_pair(18, 4), max_tokens=8, overflow="split")


def test_drop_and_min_tokens_are_counted_with_their_tokens() -> None:
    cfg = DataConfig(max_tokens=8, overflow="drop", min_tokens=4)
    account = SplitAccount(found=4)
    kept = [build_sequences(_text(tokens), cfg, account) for tokens in (3, 4, 8, 9)]
    assert [len(sequences) for sequences in kept] == [0, 1, 1, 0]
    assert (account.short.documents, account.short.tokens) == (1, 3)
    assert (account.long.documents, account.long.tokens) == (1, 9)
    assert account.tokens == 12


@pytest.mark.parametrize(("tokens", "whole"), [(3, 1), (4, 1), (5, 0)])
def test_short_documents_labelled_whole_are_counted(tokens: int, whole: int) -> None:
    (sequence,), account = _build(_text(tokens), max_tokens=8, completion_tokens=3)
    assert account.whole_labelled == whole
    assert len(_labels(sequence)) == min(tokens - 1, 3)


@pytest.mark.parametrize("overflow", ["truncate", "split", "drop"])
@pytest.mark.parametrize("completion", [0, 5])
def test_books_balance_on_random_documents(overflow: str, completion: int) -> None:
    lengths = random.Random(0).choices(range(1, 60), k=200)
    cfg = DataConfig(max_tokens=17, overflow=overflow, min_tokens=3, completion_tokens=completion)  # type: ignore[arg-type]
    account = SplitAccount(found=len(lengths))
    sequences = [sequence for n in lengths for sequence in build_sequences(_text(n), cfg, account)]
    assert account.tokens_read == sum(lengths)
    assert account.tokens_read == account.tokens + account.truncated.tokens + account.short.tokens + account.long.tokens
    assert account.found == account.documents + account.short.documents + account.long.documents
    assert account.tokens == sum(len(sequence.ids) for sequence in sequences)
    assert account.labelled_tokens == sum(len(_labels(sequence)) for sequence in sequences)
    assert account.sequences == len(sequences) == account.documents - account.split.documents + account.pieces
    assert max(account.sequence_lengths) <= cfg.max_tokens
    assert all(_labels(sequence) for sequence in sequences)


def test_pack_is_best_fit_decreasing() -> None:
    # 6 and 5 open rows; 4 fills the row of 6 exactly (not that of 5); 3 and 2 fill the row of 5.
    assert pack([2, 6, 3, 4, 5], 10) == [[0, 2, 4], [1, 3]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_pack_holds_every_sequence_once_within_the_limit_and_wastes_little() -> None:
    generator = random.Random(1)
    for limit in (5, 64, 1000):
        lengths = [generator.randint(1, limit) for _ in range(500)]
        groups = pack(lengths, limit)
        assert sorted(index for group in groups for index in group) == list(range(500))
        assert all(sum(lengths[index] for index in group) <= limit for group in groups)
        assert groups == pack(lengths, limit)
        # Two rows at most half full would have been one.
        assert sum(2 * sum(lengths[index] for index in group) <= limit for group in groups) <= 1


def test_pack_sequences_keeps_whole_sequences() -> None:
    sequences = [sequence for n in (3, 7, 5) for sequence in _build(_text(n), max_tokens=8)[0]]
    rows = pack_sequences(sequences, 8)
    assert [[len(sequence.ids) for sequence in row] for row in rows] == [[3, 5], [7]]
