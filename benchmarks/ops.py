"""Times one operation and makes a record of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from lemo.bench.records import Record
from lemo.bench.step import timed
from lemo.memory import PeakTracker
from lemo.memory.tracker import GIB
from lemo.training.summary import versions

REPEATS = 5


def op_row(setting: str, method: str, shape: str, T: int, run: Callable[[], object], device: str) -> Record:
    """A row of `REPEATS` calls after one that warms up.

    Args:
        setting: what was called, in words.
        method: the method it belongs to.
        shape: name of the shape.
        T: tokens.
        run: the call.
        device: where it runs.
    """
    with timed(device):
        run()
    tracker = PeakTracker(device)
    held = torch.cuda.memory_allocated() if device != "cpu" else 0
    times = []
    for _ in range(REPEATS):
        with timed(device) as seconds:
            run()
        times.append(1000 * seconds[0])
    row = Record(
        bench="op", method=method, shape=shape, T=T, batch=1, setting=setting, steps=REPEATS, versions=versions()
    )
    row.step_ms, row.step_ms_min, row.step_ms_max = statistics.median(times), min(times), max(times)
    row.peak_gib = tracker.read().peak_gib
    row.details = {"above_what_was_held_gib": row.peak_gib - held / GIB if device != "cpu" else None}
    print(f"{setting}, {T} tokens: {row.step_ms:.2f} ms, peak {row.peak_gib:.2f} GiB", flush=True)
    return row
