"""What became of every document and token, for the table before step 1 and for `summary.json`.

Two sums hold exactly (tested):
    found       = documents + empty + short + long + not_taken      (documents)
    tokens_read = tokens + truncated + short + long                 (tokens)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table


@dataclass
class Tally:
    """Documents something happened to, and how many tokens it concerned."""

    documents: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        """One more document."""
        self.documents += 1
        self.tokens += tokens


@dataclass
class SplitAccount:
    """One split's books. Counts are documents unless the name says otherwise.

    Attributes:
        found: documents the search found for this split.
        empty: files with nothing but white space, which hold no tokens to train on.
        not_taken: left unread because `max_documents` was reached.
        tokens_read: tokens of all documents that were tokenized.
        short, long: dropped under `min_tokens`, dropped over `max_tokens`; their whole tokens.
        truncated: cut to `max_tokens`; tokens cut off.
        split, pieces: cut into pieces, with their whole tokens; sequences they became.
        documents, tokens, labelled_tokens: what is used.
        labels_lost: labels of used documents that were cut off, or whose token now starts a sequence.
        whole_labelled: sequences of at most `completion_tokens` + 1, labelled except for their first token.
        sequence_lengths: tokens of each sequence, before packing.
        packed_rows: rows the sequences were packed into; None without packing.
    """

    found: int = 0
    empty: int = 0
    not_taken: int = 0
    tokens_read: int = 0
    short: Tally = field(default_factory=Tally)
    long: Tally = field(default_factory=Tally)
    truncated: Tally = field(default_factory=Tally)
    split: Tally = field(default_factory=Tally)
    pieces: int = 0
    documents: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    labels_lost: int = 0
    whole_labelled: int = 0
    sequence_lengths: list[int] = field(default_factory=list)
    packed_rows: int | None = None

    @property
    def sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def rows(self) -> int:
        """Rows of the dataset."""
        return self.sequences if self.packed_rows is None else self.packed_rows

    def percentiles(self) -> dict[str, int]:
        """Sequence lengths before packing (tokens): min, p50, p90, max. Empty without sequences."""
        if not self.sequence_lengths:
            return {}
        points = {"min": 0, "p50": 50, "p90": 90, "max": 100}
        values = np.percentile(self.sequence_lengths, list(points.values()), method="nearest")
        return dict(zip(points, map(int, values), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The books as JSON-able values."""
        tallies = {
            name: {"documents": tally.documents, "tokens": tally.tokens}
            for name, tally in (
                ("dropped_short", self.short),
                ("dropped_long", self.long),
                ("truncated", self.truncated),
                ("split", self.split),
            )
        }
        return {
            "found": self.found,
            "empty": self.empty,
            "not_taken": self.not_taken,
            "tokens_read": self.tokens_read,
            **tallies,
            "pieces": self.pieces,
            "documents": self.documents,
            "sequences": self.sequences,
            "packed_rows": self.packed_rows,
            "tokens": self.tokens,
            "labelled_tokens": self.labelled_tokens,
            "labels_lost": self.labels_lost,
            "whole_labelled": self.whole_labelled,
            "lengths": self.percentiles(),
        }


@dataclass(frozen=True)
class DataReport:
    """Both splits' books and the remarks that numbers can't make."""

    train: SplitAccount
    heldout: SplitAccount
    notes: tuple[str, ...] = ()

    def as_rows(self) -> list[tuple[str, str, str]]:
        """(what, train, held-out), ready to print."""
        return [
            (label, left, right)
            for (label, left), (_, right) in zip(_lines(self.train), _lines(self.heldout), strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for `summary.json`."""
        return {"train": self.train.as_dict(), "heldout": self.heldout.as_dict(), "notes": list(self.notes)}

    def render(self) -> Table:
        """The table shown before step 1; the remarks are its caption."""
        table = Table(title="Data", caption="\n".join(self.notes) or None, caption_justify="left")
        table.add_column("", no_wrap=True)
        table.add_column("train", justify="right")
        table.add_column("held-out", justify="right")
        for row in self.as_rows():
            table.add_row(*row)
        return table


def _lines(account: SplitAccount) -> list[tuple[str, str]]:
    lengths = account.percentiles()
    packed = "no" if account.packed_rows is None else f"{account.sequences:,} → {account.packed_rows:,} rows"
    return [
        ("documents found", f"{account.found:,}"),
        ("  empty files", f"{account.empty:,}"),
        ("  past max_documents", f"{account.not_taken:,}"),
        ("  dropped under min_tokens", _tally(account.short)),
        ("  dropped over max_tokens", _tally(account.long)),
        ("documents used", f"{account.documents:,}"),
        ("  truncated", _tally(account.truncated, "cut")),
        ("  split", f"{account.split.documents:,} → {account.pieces:,} sequences" if account.pieces else "0"),
        ("sequences", f"{account.sequences:,}"),
        ("  packed", packed),
        ("tokens", f"{account.tokens:,}"),
        ("labelled tokens", f"{account.labelled_tokens:,}"),
        ("  labels lost by cutting", f"{account.labels_lost:,}"),
        ("length: min, median", _pair(lengths, "min", "p50")),
        ("length: p90, max", _pair(lengths, "p90", "max")),
    ]


def _tally(tally: Tally, what: str = "tokens") -> str:
    return f"{tally.documents:,} ({tally.tokens:,} {what})" if tally.documents else "0"


def _pair(lengths: dict[str, int], first: str, second: str) -> str:
    return f"{lengths[first]:,}, {lengths[second]:,}" if lengths else "-"
