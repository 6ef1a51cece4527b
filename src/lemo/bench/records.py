"""Benchmark records: one JSON object a line, the same keys in every row, null where one doesn't apply (DESIGN 9)."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lemo.config_io import SAVED_CONFIG
from lemo.errors import UserError
from lemo.training.storage import storage_errors, write_text

FILE = "records.jsonl"


def commit() -> str:
    """The checkout's commit, with `+changes` if the tree differs from it; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name() -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def command() -> str:
    """What was typed: `lemo ...`, or `python -m benchmarks.record_... ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec is not None else "lemo"
    program = ["lemo"] if module.partition(".")[0] == "lemo" else ["python", "-m", module]
    return shlex.join([*program, *sys.argv[1:]])


@dataclass
class Record:
    """One row. Units are in the names.

    Attributes:
        bench: `quality`, `step`, `op`, `plan` or `calibration`.
        method: `lora+ckpt`, `lemo-backward`, ... (DESIGN 9).
        model, shape: a model's name, or the shape of one with random weights.
        task: `sft`, `lm`, `retrieval` or `extension`.
        T: longest sequence (tokens).
        keep, density, fidelity: measured means over steps and layers.
        setting: the knobs asked for; `default` is the product's default.
        steps: optimizer steps.
        step_ms, step_ms_min, step_ms_max: median and range of one step, timed alone on the device.
        wall_s: seconds of the training loop of this run; `concurrent` processes shared the device meanwhile.
        loss_before, loss_after: held-out, by the dense model. `loss_after_sparse`: with tokens left out (`forward`).
        accuracy_before, accuracy_after, accuracy_after_sparse: retrieval, share of answers right in every token.
        gain_retained: (before - after) / (before - after of `lora+ckpt`, same task and seed).
        steps_equal_time, loss_after_equal_time, gain_retained_equal_time: with as many steps as fit in the time of
            `lora+ckpt`'s.
        details: what belongs to a task: `by_position`, `by_depth`, lists of objects.
    """

    bench: str
    method: str
    model: str | None = None
    shape: str | None = None
    task: str | None = None
    T: int | None = None
    batch: int | None = None
    keep: float | None = None
    density: float | None = None
    fidelity: float | None = None
    setting: str | None = None
    seed: int | None = None
    steps: int | None = None
    step_ms: float | None = None
    step_ms_min: float | None = None
    step_ms_max: float | None = None
    tokens_per_s: float | None = None
    wall_s: float | None = None
    concurrent: int | None = None
    peak_gib: float | None = None
    peak_reserved_gib: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_after_sparse: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_after_sparse: float | None = None
    gain_retained: float | None = None
    steps_equal_time: int | None = None
    loss_after_equal_time: float | None = None
    gain_retained_equal_time: float | None = None
    recall: float | None = None
    details: dict[str, Any] | None = None
    gpu: str = field(default_factory=device_name)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = field(default_factory=commit)
    command: str = field(default_factory=command)
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


KEYS = tuple(item.name for item in fields(Record))


def write(records: Iterable[Record], path: Path) -> None:
    """Writes rows to `path`, whole or not at all; an older file is replaced.

    Raises:
        UserError: there is no room.
    """
    text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
    with storage_errors(path.name, path.parent, "free some space, then run the command again; it goes on"):
        write_text(path, text)


def read(path: Path) -> list[Record]:
    """All rows of one file.

    Raises:
        UserError: it can't be read, or a line isn't a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); give a file of benchmark records") from error
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def saved_config(directory: Path, what: str) -> Path | None:
    """The configuration of what is to be resumed; None if the directory is absent or empty.

    Args:
        directory: `--output`.
        what: `benchmark` or `study`, for the message.

    Raises:
        UserError: the directory holds something else.
    """
    saved = directory / SAVED_CONFIG
    if saved.is_file():
        return saved
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--output {directory} holds no {what} to resume; choose another --output")
    return None


def read_saved(directory: Path) -> list[Record]:
    """The rows that a directory holds, none without a file of them."""
    path = directory / FILE
    return read(path) if path.is_file() else []


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error.msg}); give a file of benchmark records") from error
    if not isinstance(row, dict) or set(row) != set(KEYS):
        odd = sorted(set(KEYS) ^ set(row)) if isinstance(row, dict) else ["an object"]
        raise UserError(f"{path}:{number}: not a benchmark record ({', '.join(odd)} missing or unknown)")
    return Record(**row)
