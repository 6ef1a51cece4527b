"""Which characters of a rendered conversation the assistant wrote.

The model's own chat template renders the messages. Two ways to find the assistant's turns in the result:
1. A template with `{% generation %}` marks says so itself.
2. Otherwise an assistant turn is what its message adds to the text: the span starts where the conversation before it,
   rendered with the generation prompt, ends, and ends where the conversation including it ends. That holds only if
   both are prefixes of the whole, which some templates break (they rewrite earlier turns); then it is an error.

Spans are found in characters, then carried over to tokens. Comparing token sequences instead would fail wherever a
token straddles the border, and transformers' own assistant mask loses or over-extends a span that starts or ends
in white space which the tokenizer trims from its offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lemo.data.jsonl import Conversation, Message
from lemo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no chat template, or can't say where its tokens lie in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "data with messages needs a tokenizer with a chat template, and this model's has none; "
                "use an instruction-tuned model, set tokenizer.chat_template, or give prompt + completion"
            )
        if not tokenizer.is_fast:
            raise UserError(
                "data with messages needs a fast tokenizer (one that says where its tokens lie in the text), "
                "and this model's is not; give prompt + completion instead"
            )
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(f"this model's chat template can't be used: {error}") from error
        self._special = dict(tokenizer.special_tokens_map)
        self._marked = _GENERATION.search(self._template) is not None

    def __call__(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """The conversation as text, and the assistant's character spans (start, end), ascending and disjoint.

        Raises:
            UserError: the template refuses the messages, or the assistant's turns can't be told or are empty.
        """
        messages = [{key: value for key, value in message.items() if value is not None}
                    for message in conversation.messages]  # fmt: skip
        if self._marked:
            text, found = self._render(messages, where, marks=True)
            spans = [(start, end) for start, end in found if end > start]
        else:
            text, _ = self._render(messages, where)
            spans = self._differences(messages, text, where)
        if not spans:
            raise UserError(
                f"{where}: the chat template leaves nothing of the assistant's turns, so every label is "
                "masked; remove the line or fill in the assistant's content"
            )
        return text, spans

    def _differences(self, messages: list[Message], text: str, where: str) -> list[Span]:
        spans: list[Span] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise UserError(
                    f"{where}: the conversation starts with the assistant, and this model's chat template "
                    "doesn't mark the assistant's turns; put a system or user message first"
                )
            before, _ = self._render(messages[:turn], where, prompt=True)
            through, _ = self._render(messages[: turn + 1], where)
            if not text.startswith(through):
                raise UserError(
                    f"{where}: message {turn + 1}: this model's chat template renders an answer differently when the "
                    "conversation goes on, so the assistant's tokens can't be told; make one line per answer (each "
                    "ending with it), or use a chat template with {% generation %} marks"
                )
            if not through.startswith(before):
                raise UserError(
                    f"{where}: message {turn + 1}: this model's chat template doesn't begin an answer with its "
                    "generation prompt, so the assistant's tokens can't be told; use a chat template with "
                    "{% generation %} marks, or give prompt + completion"
                )
            if len(through) > len(before):
                spans.append((len(before), len(through)))
        return spans

    def _render(
        self, messages: list[Message], where: str, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        arguments: dict[str, Any] = {**self._special, "add_generation_prompt": prompt}
        try:
            rendered: Any = render_jinja_template(  # (texts, spans), whatever its annotation says
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=marks,
                **arguments,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: the model's chat template refuses these messages ({error}); check the roles and their order"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if marks else []


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with a span.

    Args:
        offsets: [n] characters (start, end) of each token, in order.
        spans: ascending, disjoint.

    Returns:
        bool [n]
    """
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = bounds[:, 1]
    # Tokenizers may trim white space from offsets: a token starts where the one before ended.
    starts = np.minimum(bounds[:, 0], np.concatenate([[0], ends[:-1]]))
    inside = np.zeros(len(bounds), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside
