"""Assistant-only labels, with and without `{% generation %}` in the chat template."""

from __future__ import annotations

from typing import Any

import pytest

from lemo.data.chat import tokens_in_spans
from lemo.data.documents import Document
from lemo.data.jsonl import Conversation
from lemo.data.labelling import Encoded, Encoder
from lemo.errors import UserError
from tiny_tokenizer import CHATML, CHATML_MARKED, byte_tokenizer

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2 é"},
)


def _encode(tokenizer: Any, *messages: dict[str, str]) -> Encoded:
    document = Document("c", "chat.jsonl:4", content=Conversation(messages))
    (encoded,) = Encoder(tokenizer).encode([document])
    assert encoded is not None
    return encoded


def _labelled_text(tokenizer: Any, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.ids[encoded.labelled])


def test_marked_template_labels_what_it_marks() -> None:
    tokenizer = byte_tokenizer(template=CHATML_MARKED)
    encoded = _encode(tokenizer, *TURNS)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(list(TURNS), return_dict=False)
    assert _labelled_text(tokenizer, encoded) == "1<|im_end|>2 é<|im_end|>"


def test_marked_template_agrees_with_transformers_mask() -> None:
    tokenizer = byte_tokenizer(template=CHATML_MARKED)
    own = tokenizer.apply_chat_template(list(TURNS), return_dict=True, return_assistant_tokens_mask=True)
    encoded = _encode(tokenizer, *TURNS)
    assert encoded.labelled is not None
    assert encoded.labelled.astype(int).tolist() == own["assistant_masks"]


def test_unmarked_template_labels_what_each_answer_adds() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    encoded = _encode(tokenizer, *TURNS)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(list(TURNS), return_dict=False)
    assert _labelled_text(tokenizer, encoded) == "1<|im_end|>\n2 é<|im_end|>\n"


def test_conversation_may_go_on_after_the_last_answer() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    assert _labelled_text(tokenizer, _encode(tokenizer, *TURNS[:4])) == "1<|im_end|>\n"


def test_token_over_the_border_is_labelled_and_its_neighbours_are_right() -> None:
    # "\n" of the generation prompt and "\n" of the answer become one token.
    tokenizer = byte_tokenizer(template=CHATML, merges=[("Ċ", "Ċ")])
    encoded = _encode(tokenizer, {"role": "user", "content": "q"}, {"role": "assistant", "content": "\nA"})
    assert _labelled_text(tokenizer, encoded) == "\n\nA<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
@pytest.mark.parametrize("answer", ["  two", "two  ", "a    b", "    "])
def test_white_space_that_the_tokenizer_trims_from_its_offsets(template: str, answer: str) -> None:
    tokenizer = byte_tokenizer(template=template, trim_offsets=True, merges=[("Ġ", "Ġ")])
    encoded = _encode(
        tokenizer,
        {"role": "user", "content": "q  "},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "  more"},
    )
    end = "<|im_end|>\n" if template == CHATML else "<|im_end|>"
    assert _labelled_text(tokenizer, encoded) == answer + end


def test_tokens_in_spans_on_bytes_of_one_character() -> None:
    offsets = [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3), (3, 4)]
    assert tokens_in_spans(offsets, [(1, 2), (3, 4)]).tolist() == [False, True, True, False, False, True]
    assert tokens_in_spans([], [(0, 1)]).tolist() == []


def test_white_space_at_the_very_end_of_a_marked_span() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '|' }}{% endfor %}"
    tokenizer = byte_tokenizer(template=marked, trim_offsets=True, merges=[("Ġ", "Ġ")])
    assert tokenizer("a  |", return_offsets_mapping=True)["offset_mapping"][1] == (3, 3)
    assert _labelled_text(tokenizer, _encode(tokenizer, {"role": "assistant", "content": "a  "})) == "a  "


def test_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(UserError, match="chat template, and this model's has none; use an instruction-tuned model"):
        _encode(byte_tokenizer(), *TURNS)


def test_template_that_rewrites_earlier_answers() -> None:
    # As Qwen3's does: reasoning is written into the last answer only.
    rewriting = CHATML.replace(
        "message['content'] +",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
    )
    tokenizer = byte_tokenizer(template=rewriting)
    assert _labelled_text(tokenizer, _encode(tokenizer, *TURNS[:3])).startswith("<think></think>1")
    with pytest.raises(
        UserError, match=r"chat\.jsonl:4: message 3: .* renders an answer differently .*one line per answer"
    ):
        _encode(tokenizer, *TURNS)


def test_template_whose_answers_do_not_begin_with_the_generation_prompt() -> None:
    # As DeepSeek-R1's does: the generation prompt opens reasoning that rendered answers don't have.
    thinking = CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>'")
    with pytest.raises(UserError, match=r"chat\.jsonl:4: message 3: .*generation prompt.*or give prompt \+ completion"):
        _encode(byte_tokenizer(template=thinking), *TURNS)


def test_template_that_refuses_the_messages() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"chat\.jsonl:4: .*refuses these messages \(no system role\); check the roles"):
        _encode(byte_tokenizer(template=refusing), *TURNS)


def test_conversation_that_starts_with_the_assistant() -> None:
    assistant = {"role": "assistant", "content": "hi"}
    with pytest.raises(
        UserError, match=r"chat\.jsonl:4: .*starts with the assistant.*put a system or user message first"
    ):
        _encode(byte_tokenizer(template=CHATML), assistant)
    marked = byte_tokenizer(template=CHATML_MARKED)
    assert _labelled_text(marked, _encode(marked, assistant)) == "hi<|im_end|>"


def test_template_that_leaves_the_answer_out() -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    for marks in ("", "{% generation %}{% endgeneration %}"):
        with pytest.raises(
            UserError, match=r"chat\.jsonl:4: .*nothing of the assistant's turns, so every label is masked"
        ):
            _encode(byte_tokenizer(template=template + marks), *TURNS)
