"""The tables of README.md, docs/quality.md and docs/speed.md, and its figure, generated from the records.

`python -m benchmarks.table` rewrites them in place, between comments such as `<!-- quality -->`, `<!-- /quality -->`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure import draw_speed
from lemo.bench.records import Record, read
from lemo.report.quality import change_text, gain_text, mean_text, quality_markdown
from lemo.report.quality_rows import TASKS, Study, row_order, studies
from lemo.report.step import Group, groups, step_markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, QUALITY, SPEED = ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "speed.md"
# Step records: marker in docs/speed.md -> file name's end.
STEPS = {"llama": "step-llama-3-8b", "qwen": "step-qwen3-8b", "parts": "step-parts"}
SHAPES = {"llama-3-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B"}
# The README's rows: a pattern of the settings shown of each method.
SHOWN = {
    "lora+ckpt": "default",
    "lemo-backward": "default",
    "lemo-segments": ".*",
    "lemo-forward": r"(.*\D)?0\.5",
    "labels-only": ".*",
    "truncated": ".*",
    "longlora": ".*",
}


def tables(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """Every generated table by file and marker; empty where nothing is recorded."""
    records = [record for path in sorted(results.glob("*/*_quality-*.jsonl")) for record in read(path)]
    return {
        README: {
            "measured": demo_table(results),
            "quality": compact_table(records),
            "speed": speed_table(full_depth(results)),
        },
        SPEED: {marker: step_markdown(step_records(results, marker)) for marker in STEPS},
        QUALITY: {f"quality:{task}": quality_markdown(records, task) for task in TASKS},
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


def step_records(results: Path, marker: str) -> list[Record]:
    """The step records of one marker."""
    return [record for path in sorted(results.glob(f"*/*_{STEPS[marker]}.jsonl")) for record in read(path)]


def full_depth(results: Path = RESULTS) -> list[Group]:
    """Step measurements at full depth, and their extrapolations from fewer layers."""
    found = [group for marker in ("llama", "qwen") for group in groups(step_records(results, marker))]
    return [group for group in found if group.layers == group.full_depth]


def speed_table(found: Sequence[Group]) -> str:
    """Markdown: a row for each method, a column for each shape and length that was measured at full depth."""
    measured = [group for group in found if not group.extrapolated_from]
    columns = [(group, T) for group in measured for T in dict.fromkeys(line.T for line in group.lines)]
    if not columns:
        return ""
    heads = ["method", *(f"{SHAPES[group.shape]}, {T // 1024}K tokens" for group, T in columns)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(line.name for group, _ in columns for line in group.lines):
        cells = [f"`{name.partition(', ')[0]}`{name[len(name.partition(', ')[0]) :]}"]
        for group, T in columns:
            other = next((g for g in found if g.shape == group.shape and g.extrapolated_from), None)
            cells.append(_speed_cell(name, T, group, other))
        lines.append(f"| {' | '.join(cells)} |")
    gpus = " and ".join(dict.fromkeys(group.gpu for group in measured))
    caption = f"Seconds a step, speed-up over `lora+ckpt`, tokens/s, peak GiB; all layers, on {gpus}."
    return f"{caption}\n\n" + "\n".join(lines)


def _speed_cell(name: str, T: int, group: Group, extrapolated: Group | None) -> str:
    line = next((line for line in group.lines if (line.T, line.name) == (T, name)), None)
    baseline = group.baseline(T)
    slow = next((x for x in extrapolated.lines if (x.T, x.name) == (T, name)), None) if extrapolated else None
    if line is None:
        return "n/a"
    if line.step_ms is None:
        return "out of memory" + (f" ({slow.step_ms / 1000:.1f} s, extrapolated)" if slow and slow.step_ms else "")
    reference, mark = (baseline.step_ms if baseline else None), ""
    if reference is None and extrapolated is not None and (beside := extrapolated.baseline(T)) is not None:
        reference, mark = beside.step_ms, "†"
    times = f"{line.step_ms / 1000:.1f} s"
    if reference and not line.is_baseline:
        times += f", **{reference / line.step_ms:.2f}×**{mark}"
    return f"{times}, {1000 * line.T / line.step_ms:,.0f}, {line.peak_gib:.1f}"


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
    draw_speed(full_depth(), ROOT / "docs" / "speed.svg")
