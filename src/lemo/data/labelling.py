"""Documents to token ids, and which of them are labelled.

A label is the token itself, at its own position (the model shifts); -100 elsewhere. The first token of a sequence
is never labelled: nothing precedes it, and in a packed row another document would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lemo.data.chat import ChatRenderer, tokens_in_spans
from lemo.data.documents import Document, digest
from lemo.data.jsonl import Conversation, Pair
from lemo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        name, where: of the document.
        digest: of its content, to find the same text twice.
        ids: int32 [n]
        labelled: bool [n], or None for plain text, whose labels depend on how it is cut.
        prompt_tokens: for prompt + completion, where the completion starts; None otherwise.
    """

    name: str
    where: str
    digest: str
    ids: np.ndarray
    labelled: np.ndarray | None = None
    prompt_tokens: int | None = None


class Encoder:
    """Tokenizes documents of every kind.

    Plain text gets the special tokens that the tokenizer gives any text. Prompt and completion are tokenized apart,
    as in generation, and the end-of-sequence token follows the completion. Conversations go through the model's
    chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._chat: ChatRenderer | None = None

    def encode(self, documents: Iterable[Document], at_most: int | None = None) -> Iterator[Encoded | None]:
        """The documents as tokens, in order; None stands for a file that holds nothing but white space.

        Args:
            documents: read one batch at a time.
            at_most: documents per batch, if fewer than usual; the caller may stop after any of them.

        Raises:
            UserError: a document can't be read, or its conversation can't be rendered.
        """
        batch: list[Document] = []
        contents: list[Any] = []
        size = 0
        limit = min(_BATCH_DOCUMENTS, at_most or _BATCH_DOCUMENTS)
        for document in documents:
            batch.append(document)
            contents.append(document.read())
            size += _characters(contents[-1])
            if len(batch) >= limit or size >= _BATCH_CHARACTERS:
                yield from self._encode_batch(batch, contents)
                batch, contents, size = [], [], 0
        yield from self._encode_batch(batch, contents)

    def _encode_batch(self, documents: list[Document], contents: list[Any]) -> Iterator[Encoded | None]:
        texts: list[str] = []
        for content in contents:
            if isinstance(content, Pair):
                texts += [content.prompt, content.completion]
            elif not isinstance(content, Conversation):
                texts.append(content)
        pieces = iter(self._tokenize(texts)["input_ids"]) if texts else iter(())
        for document, content in zip(documents, contents, strict=True):
            about = (document.name, document.where, digest(content))
            if isinstance(content, Pair):
                yield Encoded(*about, *self._pair(next(pieces), next(pieces)))
            elif isinstance(content, Conversation):
                yield Encoded(*about, *self._conversation(content, document.where))
            else:
                ids = next(pieces)
                yield Encoded(*about, _ids(self._prefix, ids, self._suffix)) if content.strip() else None

    def _pair(self, prompt: list[int], completion: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
        end = self._tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(
                "data with prompt + completion needs a tokenizer with an end-of-sequence token, and this "
                "model's has none; set tokenizer.eos_token"
            )
        ids = _ids(self._prefix, prompt, completion, [end])
        start = len(self._prefix) + len(prompt)
        return ids, np.arange(len(ids)) >= start, start

    def _conversation(self, conversation: Conversation, where: str) -> tuple[np.ndarray, np.ndarray]:
        if self._chat is None:
            self._chat = ChatRenderer(self._tokenizer)
        text, spans = self._chat(conversation, where)
        tokens = self._tokenize([text], return_offsets_mapping=True)
        return _ids(tokens["input_ids"][0]), tokens_in_spans(tokens["offset_mapping"][0], spans)

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        # verbose=False: data.overflow says what happens to long documents, not a tokenizer's warning.
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )


def tail_labelled(tokens: int, completion_tokens: int) -> np.ndarray:
    """Plain text: the last `completion_tokens` are labelled (0: all), never the first. bool [tokens]."""
    start = tokens - completion_tokens if completion_tokens else 0
    return np.arange(tokens) >= max(start, 1)


def make_labels(ids: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Labels of one sequence: `ids` where `labelled`, -100 elsewhere and at the first token. int32 [n]."""
    labels = np.where(labelled, ids, IGNORED).astype(np.int32)
    labels[:1] = IGNORED
    return labels


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after any text."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    full = tokenizer("a b", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise UserError(
        "this model's tokenizer tokenizes a text differently when it adds special tokens, which lemo can't "
        "follow; use a tokenizer that only puts them before and after"
    )


def _ids(*parts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _characters(content: Any) -> int:
    if isinstance(content, Pair):
        return len(content.prompt) + len(content.completion)
    if isinstance(content, Conversation):
        return sum(len(message["content"]) for message in content.messages)
    return len(content)
