"""Records of quality studies made of invented numbers, for the tests of the report and of the tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lemo.bench.records import Record, write

GPU = "NVIDIA H100 80GB HBM3"
# method, setting, keep, fidelity, gain retained, milliseconds of a step, peak GiB, seeds
SFT: tuple[tuple[str, str, float, float | None, float, float, float, int], ...] = (
    ("lora+ckpt", "default", 1.0, None, 1.0, 540.0, 0.96, 5),
    ("lemo-backward", "default", 0.26, 0.983, 0.98, 420.0, 0.91, 5),
    ("lemo-backward", "fidelity 0.9", 0.12, 0.91, 0.93, 390.0, 0.88, 5),
    ("lemo-backward", "fidelity 0.995", 0.41, 0.996, 0.995, 470.0, 0.93, 5),
    ("lemo-backward", "keep 0.1", 0.1, 0.9, 0.92, 385.0, 0.88, 5),
    ("lemo-backward", "keep 0.25", 0.25, 0.98, 0.97, 418.0, 0.905, 5),
    ("lemo-backward", "keep 0.5", 0.5, 0.997, 0.99, 490.0, 0.94, 5),
    ("lemo-segments", "keep 0.25", 0.25, None, 0.71, 300.0, 0.6, 1),
    ("lemo-segments", "keep 0.5", 0.5, None, 0.84, 380.0, 0.75, 1),
    ("lemo-forward", "keep 0.25", 0.25, None, -8.3, 190.0, 0.4, 1),
    ("lemo-forward", "keep 0.5", 0.5, None, -5.2, 260.0, 0.55, 1),
    ("lemo-forward", "keep 0.75", 0.75, None, -1.04, 400.0, 0.8, 1),
    ("random-blocks", "keep 0.5", 0.5, 0.62, 0.9, 488.0, 0.94, 5),
    ("labels-only", "default", 0.06, 0.85, 0.91, 380.0, 0.87, 5),
    ("truncated", "keep 0.25", 0.25, None, 0.62, 150.0, 0.5, 5),
    ("truncated", "keep 0.5", 0.5, None, 0.8, 280.0, 0.7, 5),
    ("stopped", "0.75", 0.75, None, 0.97, 540.0, 0.96, 5),
    ("longlora", "default", 1.0, None, 0.88, 560.0, 0.97, 1),
)
RETRIEVAL = tuple(
    next(row for row in SFT if row[:2] == name)
    for name in (
        ("lora+ckpt", "default"),
        ("lemo-backward", "default"),
        ("lemo-forward", "keep 0.5"),
        ("labels-only", "default"),
        ("truncated", "keep 0.25"),
        ("longlora", "default"),
    )
)


def study(task: str = "sft", rows: tuple[Any, ...] = SFT, *, timed: bool = True, gpu: str = GPU) -> list[Record]:
    """One record for each row and seed, and a timing of another bench; the loss before is 1.7, LoRA's gain 0.1."""
    found = []
    for number, (method, setting, keep, fidelity, gain, step_ms, peak_gib, seeds) in enumerate(rows):
        for seed in range(seeds):
            jitter = 0.0 if method == "lora+ckpt" else 0.03 * math.sin(3 * seed + number)
            record = row(
                method,
                setting,
                seed,
                task=task,
                keep=keep,
                fidelity=fidelity,
                loss_after=1.7 - 0.1 * (gain + jitter),
                gain_retained=gain + jitter,
                peak_gib=peak_gib,
                gpu=gpu,
            )
            if timed:
                record.step_ms, record.step_ms_min, record.step_ms_max = step_ms, 0.9 * step_ms, 1.2 * step_ms
            if timed and method == "lemo-backward" and setting == "default":
                record.steps_equal_time, record.loss_after_equal_time = 129, 1.7 - 0.103
                record.gain_retained_equal_time = 1.03 + jitter
            if method == "lemo-forward":
                record.loss_after_sparse = 2.4
            record.details = {"by_position": positions(0.1 * (gain + jitter))}
            if task == "retrieval":
                record.accuracy_before, record.accuracy_after = 0.12, max(0.0, min(1.0, 0.9 * gain))
                record.accuracy_after_sparse = 0.05 if method == "lemo-forward" else None
                record.details["by_depth"] = depths(max(0.0, gain), sparse=method == "lemo-forward")
            found.append(record)
    return [*found, Record("step", "lora+ckpt", step_ms=540.0, gpu=gpu)]


def row(method: str, setting: str, seed: int, **changes: Any) -> Record:
    """One record of bench `quality`."""
    values: dict[str, Any] = {
        "task": "sft", "model": "smollm2-135m-instruct", "T": 8192, "batch": 1, "steps": 100, "loss_before": 1.7,
        "loss_after": 1.6, "peak_reserved_gib": 1.1, "wall_s": 61.0, "concurrent": 2, "gpu": GPU, "commit": "abc1234",
        "versions": {"python": "3.12.3", "torch": "2.11.0"}, "command": "lemo bench quality --config sft.yaml",
        "time": "2026-11-24T10:00:00Z",
    }  # fmt: skip
    return Record("quality", method, setting=setting, seed=seed, **values | changes)


def positions(gain: float) -> list[dict[str, Any]]:
    """Eight buckets of 1,024 tokens; the first holds no label."""
    empty = {"start": 0, "end": 1024, "tokens": 0, "before": None, "after": None}
    return [empty] + [
        {"start": 1024 * i, "end": 1024 * (i + 1), "tokens": 900, "before": 1.9 - 0.04 * i,
         "after": 1.9 - 0.04 * i - gain * (0.8 + 0.05 * i)}
        for i in range(1, 8)
    ]  # fmt: skip


def depths(gain: float, *, sparse: bool = False) -> list[dict[str, Any]]:
    """Four lengths by six depths."""
    cells = []
    for index, length in enumerate((1024, 2048, 4096, 8192)):
        for depth in range(6):
            cell = {
                "length": length,
                "depth_start": depth / 6,
                "depth_end": (depth + 1) / 6,
                "answers": 32,
                "before": 0.2 - 0.04 * index + 0.01 * depth,
                "after": max(0.0, min(1.0, gain - 0.08 * index + 0.03 * depth)),
            }
            cells.append(cell | ({"sparse": 0.05} if sparse else {}))
    return cells


def write_study(directory: Path, records: list[Record]) -> Path:
    """A study's directory."""
    directory.mkdir(parents=True)
    write(records, directory / "records.jsonl")
    return directory
