"""A task's text: which documents belong to which part, each text read once, file by file or joined by folder.

Files of a folder are joined in the order of their names, each under a line that names it, as code data at the level
of repositories are made: what a file refers to is often found in its neighbours. Folders, and files where they
aren't joined, come in an order that only their names decide, so that a part which isn't needed whole is still sampled
fairly. Nothing is tokenized beyond what is taken (a package may hold tens of megabytes).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lemo.bench.config import TaskConfig
from lemo.data.documents import Document, digest, find_documents
from lemo.data.labelling import Encoded, Encoder
from lemo.data.splitting import is_heldout, name_hash, shuffled
from lemo.errors import UserError

SEED = "task"
# Small, so that little is read for nothing; large enough for the tokenizer to use every core.
_BATCH_DOCUMENTS = 32


@dataclass(frozen=True)
class Stream:
    """Joined files as tokens.

    Attributes:
        ids: int32 [n]
        starts: token at which each file's heading begins, ascending.
        names: of the files.
        ended: whether the part holds no further text.
    """

    ids: np.ndarray
    starts: list[int]
    names: list[str]
    ended: bool

    def name_at(self, token: int) -> str:
        """The file that holds a token."""
        return self.names[bisect_right(self.starts, token) - 1]


class Part:
    """The training or the held-out documents.

    Attributes:
        name: `training` or `held-out`, for messages.
        remedy: how this part gets more text, for messages.
        found: documents.
        copies: documents passed over so far because their text had been read before, or is held out.
    """

    def __init__(
        self, name: str, documents: list[Document], encoder: Encoder, config: TaskConfig, other: Iterable[Document] = ()
    ) -> None:
        change = "raise" if name == "held-out" else "lower"
        self.name = name
        self.remedy = f"{change} task.heldout_share (now {config.heldout_share:g}) or add text to task.sources"
        self.found = len(documents)
        self.copies = 0
        self._documents = documents
        self._encoder = encoder
        self._other = other
        if not documents:
            raise UserError(f"splitting task.sources by name leaves no {name} document; {self.remedy}")

    def files(self) -> Iterator[Encoded]:
        """The files one by one, in a seeded order.

        Raises:
            UserError: a document can't be read, or isn't plain text.
        """
        return self._encode(shuffled(self._documents, SEED), headed=False)

    def stream(self, tokens: int) -> Stream:
        """The first `tokens` tokens (fewer, if the text ends) of the files joined by folder.

        Raises:
            UserError: a document can't be read or isn't plain text, or there is no text at all.
        """
        pieces: list[np.ndarray] = []
        starts: list[int] = []
        names: list[str] = []
        total = 0
        for encoded in self._encode(sorted(self._documents, key=_by_folder), headed=True):
            starts.append(total)
            names.append(encoded.name)
            pieces.append(encoded.ids)
            total += len(encoded.ids)
            if total >= tokens:
                break
        if not pieces:
            raise UserError(f"the {self.name} documents of task.sources hold no text of their own; {self.remedy}")
        return Stream(np.concatenate(pieces)[:tokens], starts, names, ended=total < tokens)

    def _encode(self, documents: Iterable[Document], *, headed: bool) -> Iterator[Encoded]:
        for encoded in self._encoder.encode(self._texts(documents, headed), _BATCH_DOCUMENTS):
            assert encoded is not None, "documents without text are passed over"
            yield encoded

    def _texts(self, documents: Iterable[Document], headed: bool) -> Iterator[Document]:
        known = {digest(_text(document)) for document in self._other}
        for document in documents:
            text = _text(document)
            if not text.strip():
                continue
            mark = digest(text)
            if mark in known:
                self.copies += 1
                continue
            known.add(mark)
            if headed:
                text = f"# file: {document.name}\n{text}" + ("" if text.endswith("\n") else "\n")
            yield replace(document, content=text)


def find_parts(config: TaskConfig, encoder: Encoder) -> tuple[Part, Part]:
    """(training, held-out): no document, and no text, is in both.

    Raises:
        UserError: a source isn't there, two sources' documents have the same name, or a part is empty.
    """
    documents: list[Document] = []
    for source in config.sources:
        prefix = "" if len(config.sources) == 1 or source.startswith("package:") else f"{Path(source).name}/"
        found = find_documents(source, "task.sources").documents
        documents += [replace(document, name=f"{prefix}{document.name}") for document in found]
    where: dict[str, str] = {}
    for document in documents:
        if document.name in where:
            raise UserError(
                f"task.sources: {where[document.name]} and {document.where} would both be named {document.name!r}; "
                "give each source once, and folders of different names"
            )
        where[document.name] = document.where
    heldout = [document for document in documents if is_heldout(document.name, config.heldout_share)]
    train = [document for document in documents if not is_heldout(document.name, config.heldout_share)]
    return Part("training", train, encoder, config, heldout), Part("held-out", heldout, encoder, config)


def _by_folder(document: Document) -> tuple[Any, ...]:
    folder = document.name.rpartition("/")[0]
    return name_hash(folder, f"{SEED}:"), folder, document.name


def _text(document: Document) -> str:
    content = document.read()
    if not isinstance(content, str):
        raise UserError(
            f"{document.where}: task.sources takes plain text, not prompts with completions or messages; "
            'give text or code files, or lines with "text"'
        )
    return content
