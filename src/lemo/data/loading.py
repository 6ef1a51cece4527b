"""From a `DataConfig` to two datasets and their books."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from lemo.config import DataConfig
from lemo.data.account import DataReport, SplitAccount
from lemo.data.documents import Document, Found, find_documents
from lemo.data.labelling import Encoded, Encoder
from lemo.data.sequences import Sequence, build_sequences, pack_sequences
from lemo.data.splitting import refuse_shared_text, shuffled, split_by_name
from lemo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """Training and held-out sequences.

    Attributes:
        train: columns input_ids, labels (lists of int), name; with packing also position_ids, and `name` joins
            the documents' names with ` + `.
        heldout: the same, never packed, in an order that makes its first n rows a fair sample.
        report: what became of every document and token.
    """

    train: Dataset
    heldout: Dataset
    report: DataReport


def load(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Loaded:
    """Read, tokenize, label, cut, split and (for training) pack the documents.

    Args:
        cfg: `RunConfig.data`.
        tokenizer: the model's.
        seed: orders the training documents, and so decides which ones `max_documents` takes.

    Raises:
        UserError: missing, empty or malformed data, documents over the limit, documents without labels, no
            held-out documents, or the same text in both splits.
    """
    train_found, train_documents, heldout_found, heldout_documents = _find(cfg)
    encoder = Encoder(tokenizer)
    train = _prepare(shuffled(train_documents, seed), encoder, cfg, "training", cfg.max_documents)
    heldout = _prepare(_fair_order(heldout_documents), encoder, cfg, "held-out")
    refuse_shared_text(train.documents, heldout.documents, split=cfg.heldout is None)
    notes = (*train_found.notes, *heldout_found.notes) if cfg.heldout is not None else train_found.notes
    if cfg.packing:
        rows = pack_sequences(train.sequences, cfg.max_tokens)
        train.account.packed_rows = len(rows)
        train_dataset = _packed_dataset(rows)
    else:
        train_dataset = _dataset(train.sequences)
    report = DataReport(train.account, heldout.account, (*notes, *_remarks(cfg, train.account, heldout.account)))
    return Loaded(train_dataset, _dataset(heldout.sequences), report)


def load_heldout(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, SplitAccount]:
    """The held-out sequences alone, exactly those of `load`, without tokenizing the training documents.

    Raises:
        UserError: as `load`, except that the same text in both splits isn't looked for.
    """
    documents = _find(cfg)[3]
    part = _prepare(_fair_order(documents), Encoder(tokenizer), cfg, "held-out")
    return _dataset(part.sequences), part.account


@dataclass(frozen=True)
class _Part:
    sequences: list[Sequence]
    documents: list[Encoded]
    account: SplitAccount


def _find(cfg: DataConfig) -> tuple[Found, list[Document], Found, list[Document]]:
    if cfg.heldout is None:
        found = find_documents(cfg.train)
        train, heldout = split_by_name(found.documents, cfg.heldout_share)
        return found, train, found, heldout
    train_found = find_documents(cfg.train)
    heldout_found = find_documents(cfg.heldout, "data.heldout")
    return train_found, list(train_found.documents), heldout_found, list(heldout_found.documents)


def _fair_order(documents: Seq[Document]) -> list[Document]:
    # A fixed salt: the seed must not change which held-out documents a run is judged by.
    return shuffled(documents, "held-out")


def _prepare(
    documents: Seq[Document], encoder: Encoder, cfg: DataConfig, part: str, at_most: int | None = None
) -> _Part:
    account = SplitAccount(found=len(documents))
    used: list[Encoded] = []
    sequences: list[Sequence] = []
    visited = 0
    for encoded in encoder.encode(documents, at_most):
        visited += 1
        if encoded is None:
            account.empty += 1
        elif built := build_sequences(encoded, cfg, account):
            sequences += built
            used.append(encoded)
        if at_most is not None and len(used) == at_most:
            break
    account.not_taken = account.found - visited
    if not sequences:
        raise UserError(_nothing_left(account, cfg, part))
    return _Part(sequences, used, account)


def _nothing_left(account: SplitAccount, cfg: DataConfig, part: str) -> str:
    reasons = [f"{account.empty} empty"] if account.empty else []
    remedies = []
    if account.short.documents:
        reasons.append(f"{account.short.documents} under data.min_tokens {cfg.min_tokens:,}")
        remedies.append("lower data.min_tokens")
    if account.long.documents:
        reasons.append(f"{account.long.documents} over data.max_tokens {cfg.max_tokens:,} with overflow drop")
        remedies.append("raise data.max_tokens or set data.overflow to truncate or split")
    if part == "held-out":
        remedies.append("raise data.heldout_share" if cfg.heldout is None else "give another data.heldout")
    remedies.append("give more text")
    why = ", ".join(reasons)
    return f"no {part} document is left of {account.found} ({why}); {', or '.join(remedies)}"


def _remarks(cfg: DataConfig, train: SplitAccount, heldout: SplitAccount) -> list[str]:
    remarks = []
    for part, account in (("train", train), ("held-out", heldout)):
        if account.whole_labelled:
            remarks.append(
                f"{part}: {account.whole_labelled:,} sequences of at most completion_tokens + 1 = "
                f"{cfg.completion_tokens + 1:,} tokens are labelled whole, except for their first token"
            )
        if account.labels_lost:
            remarks.append(f"{part}: {account.labels_lost:,} labelled tokens were cut off or now start a sequence")
    if train.not_taken:
        remarks.append(f"train: {train.not_taken:,} documents past max_documents aren't counted in tokens")
    return remarks


_TOKENS = ListOf(Value("int32"))


def _dataset(sequences: Seq[Sequence]) -> Dataset:
    columns = {
        "input_ids": [sequence.ids for sequence in sequences],
        "labels": [sequence.labels for sequence in sequences],
        "name": [sequence.name for sequence in sequences],
    }
    features = Features({"input_ids": _TOKENS, "labels": _TOKENS, "name": Value("string")})
    return Dataset.from_dict(columns, features=features)


def _packed_dataset(rows: Seq[Seq[Sequence]]) -> Dataset:
    columns = {
        "input_ids": [np.concatenate([sequence.ids for sequence in row]) for row in rows],
        "labels": [np.concatenate([sequence.labels for sequence in row]) for row in rows],
        "position_ids": [
            np.concatenate([np.arange(len(sequence.ids), dtype=np.int32) for sequence in row]) for row in rows
        ],
        "name": [" + ".join(sequence.name for sequence in row) for row in rows],
    }
    features = Features({"input_ids": _TOKENS, "labels": _TOKENS, "position_ids": _TOKENS, "name": Value("string")})
    return Dataset.from_dict(columns, features=features)
