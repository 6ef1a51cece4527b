"""Reads a run directory: resolved configuration, one record a step, and the summary once there is one.

What is damaged is an error that names file and line; what isn't there yet is None, because a run that is still going
on, or was interrupted, has a report too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lemo.config import RunConfig
from lemo.config_io import SAVED_CONFIG, load_config
from lemo.errors import UserError
from lemo.training.metrics import FILE as METRICS
from lemo.training.summary import FILE as SUMMARY

AGAIN = "put the file back, or run the job again with another --output"


class _Record(BaseModel):
    # Records may gain keys; a report shows those it knows.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Step(_Record):
    """One line of `metrics.jsonl`. Units are in the names; a value that wasn't finite is None."""

    step: int
    loss: float | None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int
    tokens_per_s: float | None
    step_s: float | None = None
    peak_gib: float
    peak_reserved_gib: float | None = None
    keep: list[tuple[float, float]]
    keep_mean: float
    fidelity: list[float | None]
    fidelity_mean: float | None


class Bucket(_Record):
    """Held-out loss at positions [start, end) of a document, None where nothing is labelled."""

    start: int
    end: int
    tokens: int = 0
    before: float | None
    after: float | None


class SampleText(_Record):
    """A held-out completion."""

    prompt_tail: str
    reference: str
    before: str
    after: str


class RunSummary(_Record):
    """`summary.json`."""

    mode: str
    steps: int
    tokens: int
    labelled_tokens: int
    loss_before: float | None
    loss_after: float | None
    keep_mean: float
    fidelity_mean: float | None
    tokens_per_s: float
    peak_gib: float
    peak_reserved_gib: float | None = None
    seed: int
    versions: dict[str, str]
    model: str | None = None
    device: str | None = None
    processes: int = 1
    data: dict[str, Any] = {}
    heldout_documents: int | None = None
    by_position: list[Bucket] = []
    sample: SampleText | None = None
    wall_s: float | None = None
    gradient_agreement: dict[str, float] | None = None


@dataclass(frozen=True)
class Run:
    """A run directory's records.

    Attributes:
        name: of the directory.
        config: resolved.
        steps: in order; empty before the first.
        summary: None while the run isn't finished.
    """

    name: str
    config: RunConfig
    steps: tuple[Step, ...]
    summary: RunSummary | None

    @property
    def layers(self) -> int:
        return len(self.steps[0].keep) if self.steps else 0

    @property
    def branches_differ(self) -> bool:
        """Whether attention and MLP ever kept different shares."""
        return any(attention != mlp for step in self.steps for attention, mlp in step.keep)

    @property
    def has_fidelity(self) -> bool:
        return any(value is not None for step in self.steps for value in step.fidelity)


def read_run(directory: Path) -> Run:
    """The records of a run directory.

    Raises:
        UserError: not a run directory, or a damaged file (named with its line).
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that `lemo finetune` wrote")
    config = directory / SAVED_CONFIG
    if not config.is_file():
        raise UserError(
            f"{directory} holds no {SAVED_CONFIG}, so it isn't a run directory; give one that `lemo finetune` wrote"
        )
    summary = directory / SUMMARY
    return Run(
        name=directory.resolve().name,
        config=load_config(config),
        steps=_read_steps(directory / METRICS),
        summary=_parse(_read(summary), RunSummary, summary) if summary.is_file() else None,
    )


def _read_steps(path: Path) -> tuple[Step, ...]:
    if not path.exists():
        return ()
    lines = _read(path).split("\n")
    # A whole file ends with a newline; what follows the last one is still being written, or was cut short by a kill.
    lines.pop()
    steps: list[Step] = []
    for number, line in enumerate(lines, start=1):
        step = _parse(line, Step, path, number)
        layers = len(steps[0].keep) if steps else len(step.keep)
        if len(step.keep) != layers or len(step.fidelity) != layers:
            raise UserError(
                f"{path}:{number}: keep has {len(step.keep)} layers and fidelity {len(step.fidelity)}, line 1 has "
                f"{layers}; {AGAIN}"
            )
        if steps and step.step <= steps[-1].step:
            raise UserError(f"{path}:{number}: step {step.step} comes after step {steps[-1].step}; {AGAIN}")
        steps.append(step)
    return tuple(steps)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; {AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {AGAIN}") from error


R = TypeVar("R", bound=_Record)


def _parse(text: str, kind: type[R], path: Path, line: int = 1) -> R:
    try:
        return kind.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        raise UserError(f"{path}:{number}: not valid JSON ({error.msg}); {AGAIN}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the value"
        raise UserError(f"{path}:{_line_of(text, first['loc'], line)}: {where}: {first['msg']}; {AGAIN}") from error


def _line_of(text: str, location: tuple[int | str, ...], first: int) -> int:
    """The line of an indented JSON file where a key stands, as near as its text tells."""
    names = [part for part in location if isinstance(part, str)]
    position = text.find(f'"{names[0]}":') if names else -1
    return first + text[: max(position, 0)].count("\n")
