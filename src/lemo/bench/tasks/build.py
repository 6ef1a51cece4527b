"""From a `TaskConfig` to two datasets and their account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lemo.bench.config import TaskConfig
from lemo.bench.tasks.retrieval import Row, heldout_lengths, plant, training_lengths
from lemo.bench.tasks.text import Part, find_parts
from lemo.bench.tasks.windows import completions, joined
from lemo.data.labelling import IGNORED, Encoder
from lemo.data.sequences import Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A task's data. Both datasets are in an order that makes their first n rows a fair sample.

    Attributes:
        config: what it was built from.
        train: columns input_ids, labels (lists of int32; -100 where not labelled), name.
        heldout: the same. `retrieval` adds, per row, `answer_start` and `answer_end` (tokens [start, end) of each
            answer), `depth` (of each answer's fact: its place / length of the text with the facts, in [0, 1)) and
            `length` (tokens of the row).
        facts: JSON-able account, `{"kind": ..., "parts": {"train": {...}, "heldout": {...}}}`. Per part:
            `documents_found`; `documents` used; `copies`: documents passed over because the same text was read before
            or is held out; `sequences`; `tokens`; `labelled_tokens`; `length_min`, `length_median`, `length_max`
            (tokens). And of `sft`: `short`, documents read that are shorter than one sequence; of `lm` and
            `extension`: `dropped_tokens` after the last whole sequence; of `retrieval`: `passes` through the text.
    """

    config: TaskConfig
    train: Dataset
    heldout: Dataset
    facts: dict[str, Any]


def build_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Reads, splits, tokenizes, cuts and labels a task's text. The same text and configuration give the same task.

    Raises:
        UserError: missing, unreadable or insufficient text, or settings that leave no room for it.
    """
    train, heldout = find_parts(config, Encoder(tokenizer))
    if config.kind == "retrieval":
        train_rows, train_facts = plant(config, train, training_lengths(config), tokenizer)
        rows, heldout_facts = plant(config, heldout, heldout_lengths(config), tokenizer)
        train_sequences = [row.sequence for row in train_rows]
        heldout_sequences = [row.sequence for row in rows]
        heldout_dataset = _dataset(heldout_sequences, rows)
    else:
        cut = completions if config.kind == "sft" else joined
        train_sequences, train_facts = cut(config, train, config.train_sequences)
        heldout_sequences, heldout_facts = cut(config, heldout, config.heldout_sequences)
        heldout_dataset = _dataset(heldout_sequences)
    parts = {
        "train": _account(train, train_sequences, train_facts),
        "heldout": _account(heldout, heldout_sequences, heldout_facts),
    }
    return Task(config, _dataset(train_sequences), heldout_dataset, {"kind": config.kind, "parts": parts})


def _account(part: Part, sequences: list[Sequence], more: dict[str, int]) -> dict[str, int]:
    lengths = [len(sequence.ids) for sequence in sequences]
    return {
        "documents_found": part.found,
        "copies": part.copies,
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "labelled_tokens": sum(int((sequence.labels != IGNORED).sum()) for sequence in sequences),
        "length_min": min(lengths),
        "length_median": int(np.percentile(lengths, 50, method="nearest")),
        "length_max": max(lengths),
        **more,
    }


def _dataset(sequences: list[Sequence], rows: list[Row] | None = None) -> Dataset:
    columns: dict[str, Any] = {
        "input_ids": _lists([sequence.ids for sequence in sequences]),
        "labels": _lists([sequence.labels for sequence in sequences]),
        "name": [sequence.name for sequence in sequences],
    }
    if rows is not None:
        answers = [np.array(row.answers, dtype=np.int32) for row in rows]
        columns |= {
            "answer_start": _lists([spans[:, 0] for spans in answers]),
            "answer_end": _lists([spans[:, 1] for spans in answers]),
            "depth": _lists([np.array(row.depths) for row in rows]),
            "length": pa.array([len(row.sequence.ids) for row in rows], pa.int32()),
        }
    # Not from_dict, which takes longer over millions of tokens than cutting them.
    return Dataset(pa.table(columns))


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
