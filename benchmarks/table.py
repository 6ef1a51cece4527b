"""The tables of README.md, docs/quality.md, docs/speed.md and docs/forward.md, and the figures, from the records.

`python -m benchmarks.table` rewrites them in place, between comments such as `<!-- quality -->`, `<!-- /quality -->`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure import draw_depths, draw_frontier, draw_speed
from benchmarks.paper import paper_table
from benchmarks.paper_figure import draw_paper
from benchmarks.speed import FORWARD, STEPS, expected_table, full_depth, parts_tables, speed_table, step_records
from lemo.bench.records import Record, read
from lemo.report.ops import op_lines, ops_markdown
from lemo.report.quality import change_text, gain_text, mean_text, quality_markdown
from lemo.report.quality_rows import TASKS, Study, row_order, studies
from lemo.report.step import step_markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, QUALITY, SPEED = ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "speed.md"
FORWARD_PAGE = ROOT / "docs" / "forward.md"
# The README's rows: a pattern of the settings shown of each method.
SHOWN = {
    "lora+ckpt": "default",
    "lemo-backward": "default",
    "lemo-segments": ".*",
    "lemo-forward": r"(.*\D)?0\.5",
    "labels-only": ".*",
    "truncated": ".*",
    "stopped": ".*",
    "longlora": ".*",
}


def named(name: str, results: Path = RESULTS) -> list[Record]:
    """The records of all files whose names end so."""
    return [record for path in sorted(results.glob(f"*/*_{name}.jsonl")) for record in read(path)]


def tables(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """Every generated table by file and marker; empty where nothing is recorded."""
    records = named("quality-*", results)
    return {
        README: {
            "quality": compact_table(records),
            "speed": speed_table(full_depth(results)),
        },
        SPEED: {
            "measured": demo_table(results),
            "expected": expected_table(full_depth(results)),
            "parts": parts_tables(step_records(results, "parts")),
            **{marker: step_markdown(step_records(results, marker)) for marker in STEPS if marker != "parts"},
        },
        FORWARD_PAGE: {
            **{marker: step_markdown(step_records(results, marker)) for marker in FORWARD},
            "paper": paper_table(results),
            "ops": ops_markdown(op_lines(named("ops", results))),
        },
        QUALITY: {
            **{f"quality:{task}": quality_markdown(records, task) for task in TASKS},
            "forward": quality_markdown(named("forward-lm", results), "lm"),
            "attend": quality_markdown(named("attend-lm", results), "lm"),
            "attend-sft": quality_markdown(named("attend-sft", results), "sft"),
            "attend-retrieval": quality_markdown(named("attend-retrieval", results), "retrieval"),
            "attend-extension": quality_markdown(named("attend-extension", results), "extension"),
        },
    }


def demo_table(results: Path = RESULTS) -> str:
    """Markdown: the demo's job by device, length and method; medians over seeds, every figure from a record."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for path in sorted(results.glob("*/*_demo.jsonl")):
        for row in read(path):
            groups.setdefault((row.gpu, row.T, row.steps, row.method), []).append(row)
    lines = [
        "| device | T | steps | method | seeds | keep | fidelity | step, ms (min to max) | peak GiB | held-out loss "
        "before → after | gain retained (range) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (gpu, T, steps, method), rows in groups.items():
        gains = [row.gain_retained for row in rows if row.gain_retained is not None]
        gain = f"{statistics.mean(gains):.0%}" if gains else "n/a"
        if len(gains) > 1 and min(gains) != max(gains):
            gain += f" ({min(gains):.0%} to {max(gains):.0%})"
        fidelity = "n/a" if rows[0].fidelity is None else format(mean(rows, "fidelity"), ".3f")
        times = [getattr(row, key) for key in ("step_ms_min", "step_ms_max") for row in rows]
        lines.append(
            f"| {gpu} | {T:,} | {steps} | `{method}` | {len(rows)} | {mean(rows, 'keep'):.2f} | {fidelity} | "
            f"{statistics.median(row.step_ms for row in rows):,.0f} ({min(times):,.0f} to {max(times):,.0f}) "
            f"| {max(row.peak_gib for row in rows):.2f} | "
            f"{mean(rows, 'loss_before'):.3f} → {mean(rows, 'loss_after'):.3f} | {gain} |"
        )
    return "\n".join(lines)


def compact_table(records: Sequence[Record]) -> str:
    """Markdown: the rows of `SHOWN`, a column for each task; a table for each device and model."""
    groups: dict[tuple[str, str], list[Study]] = {}
    for study in studies(records):
        groups.setdefault((study.gpu, Path(study.model).name), []).append(study)
    return "\n\n".join(_compact(gpu, model, group) for (gpu, model), group in groups.items())


def _compact(gpu: str, model: str, group: Sequence[Study]) -> str:
    heads = ["method"]
    for study in group:
        heads.append(f"{study.task}, T = {study.T:,}")
        if study.has("accuracy_after"):
            heads.append(f"{study.task} accuracy before → after")
    found = {
        (row.method, row.setting)
        for study in group
        for row in study.rows
        if row.method in SHOWN and re.fullmatch(SHOWN[row.method], row.setting)
    }
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method, setting in sorted(found, key=lambda name: row_order(*name)):
        cells = [f"`{method}`" if setting == "default" else f"`{method}`, {setting}"]
        for study in group:
            row = next((row for row in study.rows if (row.method, row.setting) == (method, setting)), None)
            cells.append(f"{gain_text(row)}, keep {mean_text(row.stat('keep'), '.2f')}" if row else "n/a")
            if study.has("accuracy_after"):
                cells.append(change_text(row, "accuracy_before", "accuracy_after") if row else "n/a")
        lines.append(f"| {' | '.join(cells)} |")
    caption = f"Gain retained, mean (min to max over seeds), and keep; `{model}` on {gpu}."
    return f"{caption}\n\n" + "\n".join(lines)


def mean(rows: Sequence[Record], key: str) -> float:
    """Mean of one key over rows."""
    return statistics.mean(getattr(row, key) for row in rows)


def replaced(text: str, marker: str, table: str) -> str:
    """A page's text with a table between its markers.

    Raises:
        ValueError: a marker is missing; a table that is empty needs none.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if begin not in text and end not in text and not table:
        return text
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"put {begin} and {end}, on lines of their own, where the table goes")
    return f"{before}{begin}\n{table or 'Not measured yet.'}\n{end}{after}"


def page(path: Path, parts: Mapping[str, str]) -> str:
    """A file's text with its tables; an absent file is empty.

    Raises:
        ValueError: a marker of a table is missing.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for marker, table in parts.items():
        try:
            text = replaced(text, marker, table)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return text


if __name__ == "__main__":
    for file, parts in tables().items():
        if text := page(file, parts):
            file.write_text(text, encoding="utf-8")
    draw_speed(full_depth(RESULTS), ROOT / "docs" / "speed.svg")
    draw_paper(RESULTS, ROOT / "docs" / "paper-figures.svg")
    for study in studies(named("quality-*")):
        draw_frontier(study, ROOT / "docs" / f"quality-{study.task}.svg")
        draw_depths(study, ROOT / "docs" / f"quality-{study.task}-depths.svg")
