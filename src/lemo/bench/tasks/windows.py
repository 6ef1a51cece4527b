"""Sequences cut from text: prompts with completions (`sft`), and joined files of full length (`lm`, `extension`)."""

from __future__ import annotations

import math
import random

import numpy as np

from lemo.bench.config import TaskConfig
from lemo.bench.tasks.text import SEED, Part
from lemo.data.labelling import Encoded, make_labels
from lemo.data.sequences import Sequence
from lemo.data.splitting import name_hash
from lemo.errors import UserError


def completions(config: TaskConfig, part: Part, at_most: int) -> tuple[list[Sequence], dict[str, int]]:
    """Consecutive stretches of files, the end of each labelled; in a seeded order.

    Every file gives one stretch, drawn from all of its own, before any gives a second: the sequences come from as
    many files as there are.

    Args:
        config: a task `sft`.
        part: whose text.
        at_most: sequences.

    Returns:
        The sequences, and what belongs in the account: `documents` used, and `short`: read, but shorter than the
        shortest prompt and completion.

    Raises:
        UserError: no file is long enough.
    """
    files: list[list[Sequence]] = []
    short = 0
    for document in part.files():
        if windows := _windows(document, config):
            files.append(windows)
            if len(files) == at_most:
                break
        else:
            short += 1
    if not files:
        raise UserError(
            f"none of the {part.found} {part.name} documents has task.min_tokens + the shortest of "
            f"task.completion_tokens = {config.min_tokens + config.completion_tokens[0]:,} tokens; lower them, or "
            f"{part.remedy}"
        )
    rounds = range(max(len(windows) for windows in files))
    taken = [windows[turn] for turn in rounds for windows in files if turn < len(windows)][:at_most]
    return _shuffled(taken), {"documents": len(files), "short": short}


def joined(config: TaskConfig, part: Part, at_most: int) -> tuple[list[Sequence], dict[str, int]]:
    """Sequences of exactly `max_tokens`, every token labelled, in a seeded order.

    Returns:
        The sequences, and what belongs in the account: `documents` used, and `dropped_tokens`: those after the last
        whole sequence, where the text ended.

    Raises:
        UserError: there isn't text enough for one sequence.
    """
    size = config.max_tokens
    stream = part.stream(at_most * size)
    count = len(stream.ids) // size
    if count == 0:
        raise UserError(
            f"the {part.name} text has {len(stream.ids):,} tokens, less than one sequence of task.max_tokens = "
            f"{size:,}; lower task.max_tokens, or {part.remedy}"
        )
    sequences = []
    for index in range(count):
        ids = stream.ids[index * size : (index + 1) * size]
        labels = make_labels(ids, np.ones(size, dtype=bool))
        sequences.append(Sequence(f"{stream.name_at(index * size)}#{index + 1}", ids, labels))
    used = sum(start < count * size for start in stream.starts)
    return _shuffled(sequences), {"documents": used, "dropped_tokens": len(stream.ids) - count * size}


def _windows(document: Encoded, config: TaskConfig) -> list[Sequence]:
    """A file's stretches in a seeded order. A last one that doesn't fit takes what is left, if that is enough."""
    shortest, longest = config.completion_tokens
    windows: list[Sequence] = []
    start = 0
    while (left := len(document.ids) - start) >= config.min_tokens + shortest:
        generator = random.Random(name_hash(document.name, f"{SEED} {len(windows)}:"))
        completion = _log_uniform(generator, shortest, longest)
        prompt = _log_uniform(generator, config.min_tokens, config.max_tokens - completion)
        if prompt + completion > left:
            completion = min(completion, left - config.min_tokens)
            prompt = left - completion
        ids = document.ids[start : start + prompt + completion]
        labels = make_labels(ids, np.arange(len(ids)) >= prompt)
        windows.append(Sequence(f"{document.name}#{len(windows) + 1}", ids, labels))
        start += len(ids)
    return _shuffled(windows)


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))


def _shuffled(sequences: list[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda sequence: (name_hash(sequence.name, f"{SEED}:"), sequence.name))
