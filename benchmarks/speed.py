"""The tables of step times in README.md and docs/speed.md: full depth, what was expected, where a step goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lemo.bench.records import Record, read
from lemo.bench.step_config import LIGER, STRONG_BASELINE
from lemo.report.step import Group, groups
from lemo.report.step_line import Line

# Step records: marker in docs/speed.md -> file name's end.
STEPS = {
    "llama": "step-llama-3-8b",
    "qwen": "step-qwen3-8b",
    "qwen128": "step-qwen3-8b-128k",
    "attend": "step-attend",
    "attend-now": "step-attend-tma",
    "attend-sft": "step-attend-sft",
    "trl": "step-trl",
    "parts": "step-parts",
}
# The same of mode `forward`, in docs/forward.md.
FORWARD = {
    "forward2": "step-forward-llama-2-7b",
    "forward3": "step-forward-llama-3-8b",
    "forwardlong": "step-forward-long",
    "forwardopt": "step-forward-opt",
}
SHAPES = {"llama-3-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B"}
OUT = "out of memory"
EXTRAPOLATED = "†"
_NONE = "n/a"


@dataclass(frozen=True)
class Depth:
    """One shape at full depth on one device: what was measured, and what shallower models give."""

    measured: Group
    extrapolated: Group | None

    def lines(self, T: int, name: str) -> tuple[Line | None, Line | None]:
        """Measured and extrapolated."""
        return self.measured.line(T, name), self.extrapolated.line(T, name) if self.extrapolated else None

    def step_ms(self, T: int, name: str) -> tuple[float | None, str]:
        """A step's time, measured where it fits the device, otherwise extrapolated and marked so."""
        line, further = self.lines(T, name)
        if line is not None and line.step_ms is not None:
            return line.step_ms, ""
        return (further.step_ms, f" {EXTRAPOLATED}") if further is not None else (None, "")

    def floor_ms(self, T: int, name: str) -> float | None:
        """What the step's operations take at the ceiling."""
        return next((line.floor_ms for line in self.lines(T, name) if line is not None and line.floor_ms), None)

    def speed_up(self, line: Line, over: str) -> str:
        """A cell: over a baseline, marked if that didn't fit and is extrapolated."""
        theirs, mark = self.step_ms(line.T, over)
        return f"×{theirs / line.step_ms:.2f}{mark}" if theirs and line.step_ms else _NONE


def step_records(results: Path, marker: str) -> list[Record]:
    """The step records of one marker."""
    return [record for path in sorted(results.glob(f"*/*_{(STEPS | FORWARD)[marker]}.jsonl")) for record in read(path)]


def full_depth(results: Path) -> list[Depth]:
    """What was measured at full depth, by shape and device."""
    found = [group for marker in ("llama", "qwen") for group in groups(step_records(results, marker))]
    return [
        Depth(
            group,
            next((g for g in found if g.extrapolated_from and (g.gpu, g.shape) == (group.gpu, group.shape)), None),
        )
        for group in found
        if group.layers == group.full_depth and not group.extrapolated_from
    ]


def speed_table(found: Sequence[Depth]) -> str:
    """Markdown: a row for each method, shape and length that was measured at full depth.

    A method that ran out of memory everywhere, and in shallower models too, has no rows but is named.
    """
    if not found:
        return ""
    names = dict.fromkeys(line.name for depth in found for line in depth.measured.lines)
    hopeless = [
        name
        for name in names
        if not any(depth.step_ms(line.T, name)[0] for depth in found for line in depth.measured.lines)
    ]
    heads = ("shape", "T", "method", "step, s", "tokens/s", f"over `{STRONG_BASELINE}`", f"over `{LIGER}`", "peak GiB")
    rows = []
    for depth in found:
        for line in depth.measured.lines:
            if line.name in hopeless:
                continue
            _, further = depth.lines(line.T, line.name)
            rows.append((SHAPES[depth.measured.shape], f"{line.T:,}", method(line.name), *_cells(depth, line, further)))
    gpus = " and ".join(dict.fromkeys(depth.measured.gpu for depth in found))
    caption = f"All layers, one sequence a step, on {gpus}."
    if hopeless:
        caption += f" Out of memory in all of these: {', '.join(method(name) for name in hopeless)}."
    if any(EXTRAPOLATED in cell for row in rows for cell in row):
        caption += f" {EXTRAPOLATED}: extrapolated from models with fewer layers, since it doesn't fit the card."
    return f"{caption}\n\n{table(heads, rows)}"


def _cells(depth: Depth, line: Line, further: Line | None) -> tuple[str, ...]:
    if line.step_ms is not None:
        numbers = f"{line.step_ms / 1000:.1f}", f"{line.tokens_per_s:,.0f}"
        ups = (depth.speed_up(line, over) for over in (STRONG_BASELINE, LIGER))
        return (*numbers, *ups, f"{line.peak_gib:.1f}" if line.peak_gib is not None else _NONE)
    if further is None or further.step_ms is None:
        return OUT, _NONE, _NONE, _NONE, _NONE
    peak = _NONE if further.peak_gib is None else f"{further.peak_gib:.1f} {EXTRAPOLATED}"
    time = f"{OUT} ({further.step_ms / 1000:.1f} {EXTRAPOLATED})"
    return time, f"{further.tokens_per_s:,.0f} {EXTRAPOLATED}", _NONE, _NONE, peak


def expected_table(found: Sequence[Depth]) -> str:
    """Markdown: speed-up by the operations alone beside what came, and how far extrapolated steps were off."""
    rows = []
    for depth in found:
        if depth.extrapolated is None:
            continue
        for further in depth.extrapolated.lines:
            line = depth.measured.line(further.T, further.name)
            ours, theirs = (depth.floor_ms(further.T, name) for name in (further.name, STRONG_BASELINE))
            fits = line is not None and line.step_ms is not None
            off = further.step_ms / line.step_ms - 1 if fits and line and line.step_ms and further.step_ms else None
            up = depth.extrapolated.speed_up(further)
            rows.append(
                (
                    SHAPES[depth.measured.shape],
                    f"{further.T:,}",
                    method(further.name),
                    f"×{theirs / ours:.2f}" if theirs and ours else _NONE,
                    depth.speed_up(line, STRONG_BASELINE) if fits and line else (OUT if line else "not measured"),
                    f"×{up:.2f}" if up else _NONE,
                    _NONE if off is None else f"{off:+.1%}".replace("-", "−"),
                )
            )
    heads = ("shape", "T", "method", "by operations", "all layers", "extrapolated", "extrapolated step off by")
    return table(heads, rows) if rows else ""


def parts_tables(records: Iterable[Record]) -> str:
    """Markdown: one step by kind for every method, then by part for those that leave tokens out."""
    return "\n\n".join(text for group in groups(records) if (text := _parts_of(group)))


def _parts_of(group: Group) -> str:
    """The tables of a shape and depth, a pair for each length."""
    texts = []
    for T in dict.fromkeys(line.T for line in group.lines):
        lines = [line for line in group.lines if line.T == T and line.parts and line.step_ms]
        if not lines:
            continue
        texts.append(f"{group.title}, {T:,} tokens; ms.\n\n{_kinds(lines)}")
        if sparse := [line for line in lines if any(floor for _, _, floor in line.parts)]:
            texts.append(
                f"The same by part; in brackets what its operations take at the ceiling.\n\n{_by_part(sparse)}"
            )
    return "\n\n".join(texts)


def _kinds(lines: Sequence[Line]) -> str:
    def by(line: Line, kind: str) -> float:
        return sum(ms for name, ms, _ in line.parts if name.rpartition(" ")[2] == kind)

    def row(name: str, values: Iterable[float | None]) -> list[str]:
        return [name, *(_NONE if value is None else f"{value:,.0f}" for value in values)]

    rows = [row(kind, (by(line, kind) for line in lines)) for kind in ("attention", "linears", "other")]
    rows.append(row("in no part", (_idle(line) for line in lines)))
    rows.append(row("the step", (line.step_ms for line in lines)))
    rows.append(row("its operations at the ceiling", (line.floor_ms for line in lines)))
    return table(("", *(method(line.name) for line in lines)), rows)


def _by_part(lines: Sequence[Line]) -> str:
    found = [{name: (ms, floor) for name, ms, floor in line.parts} for line in lines]
    rows = []
    for name in dict.fromkeys(name for parts in found for name in parts):
        cells = [parts.get(name, (0.0, None)) for parts in found]
        if max(ms for ms, _ in cells) >= 0.05:
            rows.append([name, *(f"{ms:,.1f}" + (f" ({floor:,.1f})" if floor else "") for ms, floor in cells)])
    rows.append(["in no part", *(f"{_idle(line):,.1f}" for line in lines)])
    chosen = ("selection", "compensation")
    shares = (
        sum(ms for name, ms, _ in line.parts if name.rpartition(" ")[0] in chosen) / (line.step_ms or 1.0)
        for line in lines
    )
    rows.append([f"{' and '.join(chosen)}, of the step", *(f"{share:.1%}" for share in shares)])
    return table(("part", *(method(line.name) for line in lines)), rows)


def _idle(line: Line) -> float:
    """The median step less the profiled step's work: the device waits, and the profiler is off by a little."""
    return (line.step_ms or 0.0) - sum(ms for _, ms, _ in line.parts)


def method(name: str) -> str:
    """A line's name, with the method as code."""
    first, comma, rest = name.partition(", ")
    return f"`{first}`{comma}{rest}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
