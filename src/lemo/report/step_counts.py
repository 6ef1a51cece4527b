"""What a step's count says (`lemo.bench.cost`, `lemo.bench.cost_memory`), beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable

from lemo.report.step_line import Line
from lemo.report.tables import html_table

_HEADS = ("T", "method", "TFLOP", "at the ceiling, ms", "step, ms", "moved, GB", "stored, GiB", "peak but weights, GiB")


def counts(lines: Iterable[Line]) -> list[str]:
    """A heading and a table, or nothing where nothing was counted."""
    rows = [_cells(line) for line in lines if line.stored_gib is not None]
    return ["<h3>By count, beside the measurement</h3>", html_table(_HEADS, rows, ("method",))] if rows else []


def _cells(line: Line) -> list[str]:
    return [
        f"{line.T:,}",
        line.name,
        _number(line.tflop, ",.0f"),
        _number(line.floor_ms, ",.0f"),
        _number(line.step_ms, ",.0f"),
        _number(line.moved_gb, ",.0f"),
        _number(line.stored_gib, ".2f"),
        _number(line.transient_gib, ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
