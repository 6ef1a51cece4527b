"""Benchmark records: one JSON object a line, the same keys in every row, null where one doesn't apply (DESIGN 9)."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


@dataclass
class Record:
    """One row. Units are in the names; `step_ms` is the median."""

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
    peak_gib: float | None = None
    peak_reserved_gib: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_after_sparse: float | None = None
    gain_retained: float | None = None
    gain_retained_equal_time: float | None = None
    recall: float | None = None
    gpu: str = field(default_factory=device_name)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = field(default_factory=commit)
    command: str = field(default_factory=lambda: shlex.join(["python", *sys.orig_argv[1:]]))
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def write(records: list[Record], path: Path) -> None:
    """Appends rows to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of one file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
