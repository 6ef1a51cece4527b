"""Reading and writing a run's configuration: YAML over defaults, `--set key=value` over YAML. No torch here.

Every mistake is a `UserError` that names where the key was given, the key, its value, and what is allowed.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lemo.config import Frozen, RunConfig
from lemo.errors import UserError

DEFAULT_CONFIG = "default.yaml"
SAVED_CONFIG = "config.yaml"
# Written last: a directory that holds it is a finished calibration.
CALIBRATION_FACTS = "calibration.json"

# pydantic's error type -> what is allowed instead; {…} is filled from the error's context.
_ALLOWED = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be smaller than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text (quote it if it looks like a number)",
    "missing": "must be given",
    "too_short": "needs at least {min_length} of them",
    "tuple_type": "must be a list, as in [a, b]",
    "model_type": "must be a section of keys, as in {{key: value}}",
    "model_attributes_type": "must be a section of keys, as in {{key: value}}",
}


C = TypeVar("C", bound=Frozen)


def load_config(
    path: Path | None = None,
    *,
    data: str | None = None,
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> RunConfig:
    """The resolved configuration of a run.

    Args:
        path: YAML file laid over `RunConfig`'s defaults. Without it and without `data`, the packaged job.
        data, model, output, device: the flags of those names; they win over the file.
        overrides: `key=value`, dotted key and YAML value, as in `sparsity.fidelity=0.9`; they win over all.
        resume: without `path`, the configuration that the run in `output` saved takes the file's place.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, or a value that isn't allowed.
    """
    given = flags(data=data, model=model, output=output, device=device)
    if path is None and data is None:
        source = f"lemo's {DEFAULT_CONFIG}"
        values = _read_yaml(files("lemo").joinpath(DEFAULT_CONFIG).read_text(encoding="utf-8"), source)
        config = resolve(RunConfig, values, source, given, overrides)
    else:
        config = load(RunConfig, path, given, overrides)
    saved = Path(config.output) / SAVED_CONFIG
    if resume and path is None and saved.is_file():
        return load_config(saved, data=data, model=model, output=config.output, device=device, overrides=overrides)
    return config


def flags(
    *, data: str | None = None, model: str | None = None, output: str | None = None, device: str | None = None
) -> dict[str, tuple[str, str | None]]:
    """The flags that commands share, as `resolve` takes them."""
    return {
        "data.train": ("--data", data),
        "model.name": ("--model", model),
        "output": ("--output", output),
        "device": ("--device", device),
    }


def load(
    kind: type[C], path: Path | None, flags: Mapping[str, tuple[str, str | None]], overrides: Sequence[str] = ()
) -> C:
    """A configuration of any kind: a YAML file, if there is one, laid over the kind's defaults; then `resolve`.

    Raises:
        UserError: as `resolve`; also an unreadable file or bad YAML.
    """
    if path is None:
        return resolve(kind, {}, "configuration", flags, overrides)
    return resolve(kind, _read_yaml(_read(path), str(path)), str(path), flags, overrides)


def resolve(
    kind: type[C],
    values: dict[str, Any],
    source: str,
    flags: Mapping[str, tuple[str, str | None]],
    overrides: Sequence[str] = (),
) -> C:
    """A configuration from what a file, flags and `--set` say; the latter win.

    Args:
        kind: class of the configuration.
        values: as read from a file.
        source: where they come from, for messages.
        flags: dotted key -> (flag, its value or None if it wasn't given).
        overrides: `key=value`, dotted key and YAML value.

    Raises:
        UserError: unknown key, or a value that isn't allowed.
    """
    _refuse_unknown(values, kind, kind, source)
    given: dict[str, str] = {}
    for key, (flag, value) in flags.items():
        if value is not None:
            _put(values, key, value, flag)
            given[key] = flag
    for override in overrides:
        key, value = _parse_override(override)
        _refuse_unknown(_nested(key, value), kind, kind, f"--set {override}")
        _put(values, key, value, f"--set {override}")
        given[key] = f"--set {override}"
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(error.errors(), kind, source, given))) from error


def save_resolved(config: Frozen, path: Path) -> None:
    """Writes every setting as YAML that reads back to an equal configuration."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def known_keys(section: type[Frozen] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from known_keys(inner, f"{prefix}{name}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: no such file; leave --config out to run the built-in example") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: can't be read as UTF-8 text ({error})") from error


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}{_line_of(error)}: not valid YAML ({_reason(error)}); correct it there") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: must hold sections of keys such as 'data:', not {type(values).__name__}")
    return values


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write key=value, as in --set sparsity.fidelity=0.9")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML ({_reason(error)}); quote it") from error


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, last = key.split(".")
    for depth, name in enumerate(sections):
        inner = values.get(name)
        if inner is None:
            inner = values[name] = {}
        elif not isinstance(inner, dict):
            raise UserError(f"{source}: {'.'.join(sections[: depth + 1])} is {inner!r}, which has no keys of its own")
        values = inner
    values[last] = value


def _refuse_unknown(
    values: Mapping[Any, Any], section: type[Frozen], root: type[Frozen], source: str, prefix: str = ""
) -> None:
    for key, value in values.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise UserError(f"{source}: unknown key {prefix}{key}{_suggest(str(key), section, root, prefix)}")
        inner = _section_of(field.annotation)
        if isinstance(value, Mapping):
            if inner is None:
                inside = repr(next(iter(value), ""))
                raise UserError(f"{source}: {prefix}{key} takes a single value, no keys such as {inside}")
            _refuse_unknown(value, inner, root, source, f"{prefix}{key}.")
        elif isinstance(value, list) and (item := _item_section(field.annotation)) is not None:
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    _refuse_unknown(entry, item, root, source, f"{prefix}{key}[{index}].")


def _suggest(key: str, section: type[Frozen], root: type[Frozen], prefix: str) -> str:
    siblings = get_close_matches(key, section.model_fields, n=1)
    if siblings:
        return f"; did you mean {prefix}{siblings[0]}?"
    everywhere = {name.rpartition(".")[2]: name for name in known_keys(root)}
    leaf = get_close_matches(key, everywhere, n=1)
    if leaf:
        return f"; did you mean {everywhere[leaf[0]]}?"
    return f"; {prefix.rstrip('.') or 'the top level'} has {', '.join(section.model_fields)}"


def _section_of(annotation: Any) -> type[Frozen] | None:
    """The configuration class an annotation stands for, also inside `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (section := _section_of(argument)) is not None:
                return section
    return None


def _item_section(annotation: Any) -> type[Frozen] | None:
    """The configuration class of the items of `tuple[X, ...]`."""
    return _section_of(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is tuple else None


def _explain(errors: list[ErrorDetails], root: type[Frozen], source: str, given: Mapping[str, str]) -> list[str]:
    """One text a key: where it was given, the key, its value, what is allowed (joined by `or`)."""
    allowed: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for error in errors:
        key, exact = _key_of(error["loc"], root)
        texts = allowed.setdefault(key, [])
        if (text := _allowed(error)) not in texts:
            texts.append(text)
        # Inside a list the input is one element; the whole value isn't known here.
        values[key] = error["input"] if exact else values.get(key, error["input"])
    return [
        f"{_source_of(key, source, given)}: {key}{_shown(values[key])} {' or '.join(texts)}".replace(": :", ":")
        for key, texts in allowed.items()
    ]


def _source_of(key: str, source: str, given: Mapping[str, str]) -> str:
    # A rule between settings is reported for their section: then any flag inside the section is to blame.
    for name, flag in given.items():
        if name == key or name.startswith(f"{key}.") or key.startswith(f"{name}."):
            return flag
    return source


def _key_of(loc: tuple[int | str, ...], root: type[Frozen]) -> tuple[str, bool]:
    """The dotted setting an error's location lies in, and whether the location is the setting itself."""
    section: type[Frozen] | None = root
    item: type[Frozen] | None = None
    key, depth = "", 0
    for part in loc:
        if isinstance(part, int) and item is not None:
            key, section, item = f"{key}[{part}]", item, None
        else:
            field = section.model_fields.get(part) if section is not None and isinstance(part, str) else None
            if field is None:
                break
            key = f"{key}.{part}" if key else str(part)
            section, item = _section_of(field.annotation), _item_section(field.annotation)
        depth += 1
    return key, depth == len(loc)


def _shown(value: Any) -> str:
    if isinstance(value, (Mapping, Frozen)):
        return ":"
    return " = null:" if value is None else f" = {value!r}:"


def _allowed(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    context = dict(error.get("ctx", {}))
    if error["type"] == "literal_error":
        context["expected"] = str(context.get("expected", "")).replace("'", "")
    template = _ALLOWED.get(error["type"])
    return error["msg"] if template is None else template.format(**context)
