"""Encoded documents to training sequences of at most `max_tokens`, with every token accounted for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from lemo.config import DataConfig
from lemo.data.account import SplitAccount
from lemo.data.labelling import IGNORED, Encoded, make_labels, tail_labelled
from lemo.errors import UserError


@dataclass(frozen=True)
class Sequence:
    """What a model sees as one document: `ids` and `labels`, int32 [n]."""

    name: str
    ids: np.ndarray
    labels: np.ndarray


def build_sequences(document: Encoded, cfg: DataConfig, account: SplitAccount) -> list[Sequence]:
    """The sequences of one document: none (dropped), one, or several (split). Enters them in `account`.

    Plain text is labelled after cutting, so each piece has its own completion tail. The labels of other documents
    are cut with their tokens.

    Raises:
        UserError: too long under `overflow: error`; a completion that doesn't fit; a sequence without labels.
    """
    tokens = len(document.ids)
    account.tokens_read += tokens
    if tokens < cfg.min_tokens:
        account.short.add(tokens)
        return []
    if tokens <= cfg.max_tokens:
        bounds = [(0, tokens)]
    elif cfg.overflow == "error":
        raise UserError(
            f"{document.where}: {tokens:,} tokens, over data.max_tokens {cfg.max_tokens:,}; raise data.max_tokens, "
            "or set data.overflow to truncate (keeps the end), split (consecutive sequences) or drop"
        )
    elif cfg.overflow == "drop":
        account.long.add(tokens)
        return []
    elif cfg.overflow == "truncate":
        _check_completion_fits(document, cfg.max_tokens)
        bounds = [(tokens - cfg.max_tokens, tokens)]
        account.truncated.add(tokens - cfg.max_tokens)
    else:
        bounds = _pieces(tokens, cfg.max_tokens)
        account.split.add(tokens)
        account.pieces += len(bounds)
    sequences = [_sequence(document, index, bounds, cfg) for index in range(len(bounds))]
    _record(document, sequences, cfg, account)
    return sequences


def pack(lengths: Seq[int], limit: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` grouped so that no group's sum passes `limit`.

    Groups and their members are in ascending order of index. Deterministic; O(n log n) comparisons.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= limit, "sequences are cut to the limit before they are packed"
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, group = limit, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(index)
        if left > length:
            insort(room, (left - length, group))
    return sorted(sorted(group) for group in groups)


def pack_sequences(sequences: Seq[Sequence], limit: int) -> list[list[Sequence]]:
    """Rows of several sequences, at most `limit` tokens each."""
    groups = pack([len(sequence.ids) for sequence in sequences], limit)
    return [[sequences[index] for index in group] for group in groups]


def _pieces(tokens: int, limit: int) -> list[tuple[int, int]]:
    """Consecutive pieces of `limit` tokens. The last may be shorter, but isn't a single token if limit > 2."""
    cuts = list(range(0, tokens, limit))
    if tokens - cuts[-1] == 1 and limit > 2:
        cuts[-1] -= 1  # a single token has nothing before it, so it could have no label
    return list(zip(cuts, [*cuts[1:], tokens], strict=True))


def _check_completion_fits(document: Encoded, limit: int) -> None:
    if document.prompt_tokens is None:
        return
    completion = len(document.ids) - document.prompt_tokens
    if completion > limit:
        raise UserError(
            f"{document.where}: its completion alone has {completion:,} tokens, over data.max_tokens {limit:,}, "
            "and truncating keeps completions whole; raise data.max_tokens or set data.overflow to drop"
        )


def _sequence(document: Encoded, index: int, bounds: list[tuple[int, int]], cfg: DataConfig) -> Sequence:
    start, end = bounds[index]
    ids = document.ids[start:end]
    labelled = document.labelled
    mask = tail_labelled(len(ids), cfg.completion_tokens) if labelled is None else labelled[start:end]
    labels = make_labels(ids, mask)
    if not (labels != IGNORED).any():
        raise UserError(_no_labels(document, index, bounds, cfg))
    name = document.name if len(bounds) == 1 else f"{document.name}#{index + 1}/{len(bounds)}"
    return Sequence(name, ids, labels)


def _no_labels(document: Encoded, index: int, bounds: list[tuple[int, int]], cfg: DataConfig) -> str:
    start, end = bounds[index]
    if len(document.ids) == 1:
        return (
            f"{document.where}: a single token, so there is nothing to predict; "
            "set data.min_tokens to 2 or more to drop such documents"
        )
    if len(bounds) > 1:
        return (
            f"{document.where}: piece {index + 1} of {len(bounds)} (tokens {start + 1:,} to {end:,}) holds no "
            "label; set data.overflow to truncate, or raise data.max_tokens"
        )
    if end - start < len(document.ids):
        return (
            f"{document.where}: no label is left in its last {cfg.max_tokens:,} tokens; raise data.max_tokens, "
            "or set data.overflow to drop"
        )
    return f"{document.where}: every label is masked; remove it, or end it with an answer that is labelled"


def _record(document: Encoded, sequences: list[Sequence], cfg: DataConfig, account: SplitAccount) -> None:
    account.documents += 1
    labelled = [int((sequence.labels != IGNORED).sum()) for sequence in sequences]
    account.tokens += sum(len(sequence.ids) for sequence in sequences)
    account.labelled_tokens += sum(labelled)
    account.sequence_lengths += [len(sequence.ids) for sequence in sequences]
    if document.labelled is not None:
        account.labels_lost += int(document.labelled[1:].sum()) - sum(labelled)
    elif cfg.completion_tokens:
        account.whole_labelled += sum(len(sequence.ids) <= cfg.completion_tokens + 1 for sequence in sequences)
