"""Facts planted in real text, and questions about some of them at the end.

A fact is a line of its own between two lines of the text. Places are drawn independently and uniformly among the
line breaks that lie at the border of a token, so two facts may be neighbours. Facts, questions and the
text are tokenized apart, so that a sequence has exactly the length asked for, no fact is cut, and the text's tokens
are those of the whole file. Tokenizers differ in whether a line break begins a token (`"\\n    "`) or ends one
(`":\\n"`); a fact brings its own line break on the side where it is missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lemo.bench.config import TaskConfig
from lemo.bench.tasks.text import SEED, Part
from lemo.data.labelling import make_labels
from lemo.data.sequences import Sequence
from lemo.data.splitting import name_hash
from lemo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADJECTIVES = (
    "amber", "ancient", "azure", "bright", "bronze", "cobalt", "copper", "crimson", "dusty", "emerald", "frozen",
    "gentle", "golden", "hidden", "humble", "ivory", "lonely", "noble", "proud", "quiet", "rapid", "rusty",
    "scarlet", "shiny", "silent", "silver", "stormy", "sunny", "tiny", "violet", "wild", "young",
)  # fmt: skip
NOUNS = (
    "badger", "bison", "camel", "eagle", "falcon", "ferret", "gecko", "goose", "heron", "hornet", "iguana",
    "jackal", "koala", "lemur", "lynx", "moose", "newt", "otter", "oyster", "panda", "parrot", "quail", "rabbit",
    "raven", "salmon", "tiger", "turtle", "viper", "walrus", "wolf", "yak", "zebra",
)  # fmt: skip
FACT = "# The access code of the {} {} is {}."
QUESTION = "\nQuestion: What is the access code of the {} {}?\nAnswer:"
ANSWER = " {}"
LEAST_TEXT = 4  # at least one token in so many is text
_ATTEMPTS = 100


@dataclass(frozen=True)
class Row:
    """One sequence with its questions' answers, in the order of the questions.

    Attributes:
        sequence: tokens, labels (the answers), name.
        answers: tokens [start, end) of each answer.
        depths: place of each answer's fact (its first token) / tokens before the questions, in [0, 1).
    """

    sequence: Sequence
    answers: list[tuple[int, int]]
    depths: list[float]


@dataclass(frozen=True)
class _Plan:
    """A sequence before it has text. A fact's two forms begin and end with its line break."""

    generator: random.Random
    length: int
    facts: list[tuple[list[int], list[int]]]
    asked: list[int]
    questions: list[list[int]]
    answers: list[list[int]]

    @property
    def document(self) -> int:
        """Tokens before the questions."""
        return self.length - sum(map(len, self.questions)) - sum(map(len, self.answers))

    @property
    def text(self) -> int:
        """Tokens of text there are at least."""
        return self.document - sum(max(len(before), len(after)) for before, after in self.facts)


def plant(
    config: TaskConfig, part: Part, lengths: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], dict[str, int]]:
    """One sequence for each of `lengths`.

    Text is taken from stretch to stretch; where it ends, it's gone through again from another place (other facts
    make another sequence of it).

    Returns:
        The sequences, and what belongs in the account: `documents` used, and `passes` through the text.

    Raises:
        UserError: too many keys or questions for a length, too little text, or text without lines.
    """
    _refuse_many(config)
    plans = [_plan(config, tokenizer, f"{part.name} {index}", length) for index, length in enumerate(lengths)]
    for plan in plans:
        if plan.text * LEAST_TEXT < plan.length:
            raise UserError(
                f"task.keys {config.keys} and task.questions {config.questions} leave {max(plan.text, 0):,} tokens of "
                f"text in a sequence of {plan.length:,}, less than a quarter; lower them, or raise task.lengths"
            )
    # What a form of a fact saves is filled up with text.
    spare = max(sum(max(map(len, forms)) - min(map(len, forms)) for forms in plan.facts) for plan in plans)
    longest = max(plan.text for plan in plans) + spare
    stream = part.stream(sum(plan.text + spare for plan in plans))
    if len(stream.ids) < longest:
        raise UserError(
            f"the {part.name} text has {len(stream.ids):,} tokens, and a sequence of {max(lengths):,} needs "
            f"{longest:,}; lower task.lengths, or {part.remedy}"
        )
    begins, ends = _line_breaks(tokenizer, stream.ids)
    rows: list[Row] = []
    start, passes, attempts = 0, 1, 0
    while len(rows) < len(plans):
        plan = plans[len(rows)]
        size = plan.text + spare
        if start + size > len(stream.ids):
            start = plan.generator.randrange(min(size, len(stream.ids) - size + 1))
            passes += 1
        here = slice(start, start + size)
        breaks = np.flatnonzero(begins[start + 1 : start + plan.text] | ends[start : start + plan.text - 1]) + 1
        if len(breaks):
            name = f"{stream.name_at(start)}#{len(rows) + 1}"
            rows.append(_row(plan, name, stream.ids[here], ends[here], breaks.tolist()))
            attempts = 0
        elif (attempts := attempts + 1) == _ATTEMPTS:
            raise UserError(
                f"facts are planted between lines, and {_ATTEMPTS} stretches of {plan.text:,} tokens of the "
                f"{part.name} text have no line break; give task.sources with shorter lines, or raise task.lengths"
            )
        start += size
    return rows, {"documents": len(stream.names), "passes": passes}


def training_lengths(config: TaskConfig) -> list[int]:
    """A length for each training sequence, uniform among `lengths`."""
    generator = random.Random(f"{SEED} lengths")
    return [generator.choice(config.lengths) for _ in range(config.train_sequences)]


def heldout_lengths(config: TaskConfig) -> list[int]:
    """`heldout_sequences` of every length, in turn."""
    return sorted(set(config.lengths)) * config.heldout_sequences


def _refuse_many(config: TaskConfig) -> None:
    most = len(ADJECTIVES) * len(NOUNS)
    if config.keys > most:
        raise UserError(f"task.keys is {config.keys:,}, and there are {most:,} names for facts; lower it")


def _plan(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, seed: str, length: int) -> _Plan:
    generator = random.Random(name_hash(seed, f"{SEED} retrieval:"))
    pairs = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    keys = generator.sample(pairs, config.keys)
    values = generator.sample(range(1000, 10000), config.keys)
    asked = generator.sample(range(config.keys), config.questions)
    facts = [FACT.format(*key, value) for key, value in zip(keys, values, strict=True)]
    texts = [f"\n{fact}" for fact in facts] + [f"{fact}\n" for fact in facts]
    texts += [QUESTION.format(*keys[fact]) for fact in asked] + [ANSWER.format(values[fact]) for fact in asked]
    tokens: Iterator[list[int]] = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])

    def take(count: int) -> list[list[int]]:
        return [next(tokens) for _ in range(count)]

    forms = list(zip(take(config.keys), take(config.keys), strict=True))
    return _Plan(generator, length, forms, asked, take(config.questions), take(config.questions))


def _line_breaks(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens begin and which end with a line break, bool [n] each."""
    unique, places = np.unique(ids, return_inverse=True)
    texts = tokenizer.batch_decode([[token] for token in unique.tolist()], clean_up_tokenization_spaces=False)
    begins = np.array([text.startswith(("\n", "\r")) for text in texts])
    ends = np.array([text.endswith("\n") for text in texts])
    return begins[places], ends[places]


def _row(plan: _Plan, name: str, text: np.ndarray, ends: np.ndarray, breaks: list[int]) -> Row:
    """Puts a plan together with its text, of which the surplus is left out.

    Args:
        text: int [n], ends: bool [n], as long as the sequence might need.
        breaks: tokens of the text before which a fact may stand.
    """
    places = sorted(plan.generator.choices(breaks, k=len(plan.facts)))
    ids: list[int] = []
    begin_of_fact: list[int] = []
    taken = 0
    for place, forms in zip(places, plan.facts, strict=True):
        ids += text[taken:place].tolist()
        begin_of_fact.append(len(ids))
        ids += forms[int(ends[place - 1])]
        taken = place
    ids += text[taken : taken + plan.document - len(ids)].tolist()
    depths = [begin_of_fact[fact] / plan.document for fact in plan.asked]
    answers: list[tuple[int, int]] = []
    for question, answer in zip(plan.questions, plan.answers, strict=True):
        ids += question
        answers.append((len(ids), len(ids) + len(answer)))
        ids += answer
    assert len(ids) == plan.length, "the surplus of text covers every choice of forms"
    labelled = np.zeros(len(ids), dtype=bool)
    for start, end in answers:
        labelled[start:end] = True
    tokens = np.asarray(ids, dtype=np.int32)
    return Row(Sequence(name, tokens, make_labels(tokens, labelled)), answers, depths)
