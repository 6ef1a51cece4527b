"""JSONL: an object a line with `text`, `prompt` + `completion`, or `messages`. Mistakes name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lemo.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is labelled."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Chat messages; the assistant's turns are labelled."""

    messages: tuple[Message, ...]


Content = str | Pair | Conversation

SCHEMAS: tuple[frozenset[str], ...] = (
    frozenset({"text"}),
    frozenset({"prompt", "completion"}),
    frozenset({"messages"}),
)
ACCEPTED = "text, prompt + completion, or messages"
_KEYS = sorted(frozenset().union(*SCHEMAS))


def parse_lines(text: str, file: str) -> Iterator[tuple[int, Content, frozenset[str]]]:
    """The file's objects: line number (from 1), content, and the keys not used. Blank lines are skipped.

    Raises:
        UserError: malformed JSON, wrong keys, a value of the wrong type, or lines with different keys.
    """
    first: tuple[int, frozenset[str]] | None = None
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        record = _parse_object(line, where)
        schema = _schema_of(record, where)
        if first is None:
            first = (number, schema)
        elif schema != first[1]:
            raise UserError(
                f"{where}: has {_list(schema)} but line {first[0]} has {_list(first[1])}; "
                "all lines of a file need the same keys, so put the two kinds in separate files"
            )
        yield number, _content_of(record, schema, where), frozenset(record) - schema


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        raise UserError(
            f"{where}: not valid JSON ({detail}); a .jsonl file holds one complete JSON object on each line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: expected a JSON object with {ACCEPTED}, found {_type_name(record)}; "
            "a .jsonl file holds one object on each line"
        )
    return record


def _schema_of(record: dict[str, Any], where: str) -> frozenset[str]:
    known = frozenset(key for key in record if key in _KEYS)
    if known in SCHEMAS:
        return known
    if any(schema < known for schema in SCHEMAS) or known > {"prompt"}:
        raise UserError(f"{where}: has {_list(known)}, which is ambiguous; keep one of {ACCEPTED}")
    if known:
        missing = {"prompt", "completion"} - known
        advice = f"{_list(known)} without {_list(missing)}{_suggestion(record, missing)}"
    else:
        advice = f"no accepted key among {_list(record)}{_suggestion(record, _KEYS)}" if record else "an empty object"
    raise UserError(f"{where}: {advice}; accepted keys are {ACCEPTED}")


def _suggestion(record: dict[str, Any], wanted: Any) -> str:
    for key in sorted(record):
        if key not in _KEYS and (near := get_close_matches(key.lower(), sorted(wanted), n=1)):
            return f" (did you mean {near[0]!r} instead of {key!r}?)"
    return ""


def _content_of(record: dict[str, Any], schema: frozenset[str], where: str) -> Content:
    if "messages" in schema:
        return Conversation(_messages(record["messages"], where))
    values = {key: _string(record[key], f"{where}: {key}") for key in sorted(schema)}
    if "text" in schema:
        if not values["text"].strip():
            raise UserError(f"{where}: text is empty; remove the line")
        return values["text"]
    if not values["completion"].strip():
        raise UserError(f"{where}: completion is empty, so nothing would be learned; fill it in or remove the line")
    return Pair(values["prompt"], values["completion"])


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: messages must be a non-empty list of objects with role and content, "
            f"found {'an empty list' if value == [] else _type_name(value)}"
        )
    for position, message in enumerate(value, start=1):
        at = f"{where}: message {position}"
        if not isinstance(message, dict):
            raise UserError(f"{at} must be an object with role and content, found {_type_name(message)}")
        for key in ("role", "content"):
            if key not in message:
                near = get_close_matches(key, sorted(message), n=1)
                hint = f" (did you mean {key!r} instead of {near[0]!r}?)" if near else ""
                raise UserError(f"{at} has no {key}{hint}; every message needs role and content")
            _string(message[key], f"{at}: {key}")
    if not any(message["role"] == "assistant" for message in value):
        roles = ", ".join(dict.fromkeys(message["role"] for message in value))
        raise UserError(
            f"{where}: no message has role assistant (roles: {roles}), so every label would be masked; "
            "add the assistant's answer or remove the line"
        )
    return tuple(value)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, found {_type_name(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half of a surrogate pair (character {error.start}), which is no text; "
            "remove it or write the whole character"
        ) from error
    return value


def _list(keys: Any) -> str:
    return " + ".join(repr(key) for key in sorted(keys, reverse=keys == {"prompt", "completion"}))


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
