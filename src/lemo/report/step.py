"""Step records as one self-contained HTML page, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lemo.bench.records import Record
from lemo.bench.step_config import STRONG_BASELINE
from lemo.errors import UserError
from lemo.report import drawing
from lemo.report.drawing import MUTED, legend, new_figure, style, svg
from lemo.report.page import document, figure
from lemo.report.step_counts import counts
from lemo.report.step_line import Line
from lemo.report.tables import html_table, versions_table

_PLAIN = "lora"
_COLORS = (drawing.FIRST, drawing.SECOND, drawing.THIRD, drawing.FOURTH, drawing.FIFTH, drawing.SIXTH)
_MARKERS = "os^DPX"
_HEADS = (
    "T",
    "method",
    "keep",
    "step, ms (min to max)",
    "speed-up",
    "tokens/s",
    "peak GiB",
    "but weights, GiB",
    "ratio",
    "of ceiling",
)
_WORDS = ("method", "part")
_PARTS_HEADS = ("part", "ms", "of the step", "its operations at the ceiling, ms")
# As a step goes through them.
_PARTS = ("forward", "loss", "selection", "keys and values", "recompute", "compensation", "backward", "optimizer")


class Details(BaseModel):
    """What a step's record says beside the keys that all records have; GiB."""

    model_config = ConfigDict(extra="allow")

    layers: int
    full_depth: int
    weights_gib: float | None
    out_of_memory: bool
    tflop: float | None
    ceiling_tflop_per_s: float | None
    parts_ms: dict[str, float] = {}
    parts_tflop: dict[str, float] = {}
    stored_gib: float | None = None
    moved_gb: float | None = None


@dataclass(frozen=True)
class Group:
    """The lines of one shape, depth and device, by length."""

    gpu: str
    shape: str
    layers: int
    full_depth: int
    extrapolated_from: tuple[int, int] | None
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        depth = f"all {self.layers} layers" if self.layers == self.full_depth else f"{self.layers} layers"
        if self.extrapolated_from:
            depth += f", extrapolated from {' and '.join(map(str, self.extrapolated_from))}"
        return f"{self.shape}, {depth}, on {self.gpu}"

    def line(self, T: int, name: str) -> Line | None:
        return next((line for line in self.lines if (line.T, line.name) == (T, name)), None)

    @property
    def baseline_name(self) -> str:
        """The strong baseline, or plain LoRA where that alone was measured."""
        names = {line.name for line in self.lines}
        return _PLAIN if STRONG_BASELINE not in names and _PLAIN in names else STRONG_BASELINE

    def baseline(self, T: int) -> Line | None:
        return self.line(T, self.baseline_name)

    def speed_up(self, line: Line, over: str | None = None) -> float | None:
        """A baseline's time of a step at the same length / this line's."""
        baseline = self.line(line.T, over or self.baseline_name)
        return baseline.step_ms / line.step_ms if baseline and baseline.step_ms and line.step_ms else None

    def operations_ratio(self, line: Line) -> float | None:
        """The baseline's operations at the same length / this line's: the speed-up at equal rates."""
        baseline = self.baseline(line.T)
        return baseline.floor_ms / line.floor_ms if baseline and baseline.floor_ms and line.floor_ms else None

    def memory_ratio(self, line: Line) -> float | None:
        """Peak without weights / the baseline's."""
        baseline = self.baseline(line.T)
        ours, theirs = line.transient_gib, baseline.transient_gib if baseline else None
        return ours / theirs if ours is not None and theirs else None


def groups(records: Iterable[Record]) -> list[Group]:
    """Step records by device, shape and depth; after the shallow ones of a shape their extrapolation to full depth.

    Raises:
        UserError: a record whose details aren't a step's, or two of the same thing.
    """
    found: dict[tuple[str, str, int, int], list[Line]] = {}
    for record in records:
        if record.bench != "step" or record.shape is None:
            continue
        details = _details(record)
        line = _line(record, details)
        lines = found.setdefault((record.gpu, record.shape, details.layers, details.full_depth), [])
        if any((old.T, old.name) == (line.T, line.name) for old in lines):
            raise UserError(
                f"two step records are {line.name} at {line.T:,} tokens ({record.shape}, {details.layers} layers, "
                f"{record.gpu}); report them apart"
            )
        lines.append(line)
    result = [Group(*key, None, tuple(sorted(lines, key=lambda x: x.T))) for key, lines in found.items()]
    return result + list(_extrapolations(result))


def _details(record: Record) -> Details:
    try:
        return Details.model_validate(record.details)
    except ValidationError as error:
        raise UserError(
            f"a step record of {record.method} has no usable details ({error.error_count()} faults); measure it anew"
        ) from error


def _line(record: Record, details: Details) -> Line:
    name = record.method if record.setting in (None, "default") else f"{record.method}, {record.setting}"
    return Line(
        T=record.T or 0,
        name=name,
        keep=record.keep,
        step_ms=record.step_ms,
        low_ms=record.step_ms_min,
        high_ms=record.step_ms_max,
        peak_gib=record.peak_gib,
        weights_gib=details.weights_gib,
        floor_ms=_floor_ms(details, details.tflop),
        parts=_parts(details),
        tflop=details.tflop,
        stored_gib=details.stored_gib,
        moved_gb=details.moved_gb,
    )


def _floor_ms(details: Details, tflop: float | None) -> float | None:
    return 1000 * tflop / details.ceiling_tflop_per_s if tflop and details.ceiling_tflop_per_s else None


def _parts(details: Details) -> tuple[tuple[str, float, float | None], ...]:
    order = {name: index for index, name in enumerate(_PARTS)}
    names = sorted(details.parts_ms, key=lambda name: (order.get(name.rpartition(" ")[0], len(order)), name))
    return tuple((name, details.parts_ms[name], _floor_ms(details, details.parts_tflop.get(name))) for name in names)


def _extrapolations(measured: Sequence[Group]) -> Iterator[Group]:
    """A step at full depth: straight lines through the two deepest shallow measurements of a shape."""
    for gpu, shape, full in dict.fromkeys((g.gpu, g.shape, g.full_depth) for g in measured):
        shallow = sorted(
            (g for g in measured if (g.gpu, g.shape) == (gpu, shape) and g.layers < full), key=lambda g: g.layers
        )
        if len(shallow) < 2:
            continue
        low, high = shallow[-2:]
        share = (full - high.layers) / (high.layers - low.layers)
        pairs = [(low.line(line.T, line.name), line) for line in high.lines]
        lines = [
            Line(
                line.T,
                line.name,
                line.keep,
                _further(other.step_ms, line.step_ms, share),
                peak_gib=_further(other.peak_gib, line.peak_gib, share),
                weights_gib=_further(other.weights_gib, line.weights_gib, share),
                floor_ms=_further(other.floor_ms, line.floor_ms, share),
            )
            for other, line in pairs
            if other is not None and other.step_ms is not None and line.step_ms is not None
        ]
        if lines:
            yield Group(gpu, shape, full, full, (low.layers, high.layers), tuple(lines))


def _further(low: float | None, high: float | None, share: float) -> float | None:
    """`high` and `share` times the way from `low` to it."""
    return None if low is None or high is None else high + share * (high - low)


def render(found: Sequence[Group], records: Sequence[Record]) -> str:
    """The whole page."""
    shapes = ", ".join(dict.fromkeys(group.shape for group in found))
    title = f"{shapes}: a training step by method"
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p>Forward, backward and optimizer step of one sequence with random weights, a LoRA adapter on every method. "
        f"Speed-up and ratio are against <code>{STRONG_BASELINE}</code> (PEFT LoRA, gradient checkpointing, segmented "
        f"loss), or where that wasn't measured <code>{_PLAIN}</code> (the same without checkpointing), at the same "
        "length; the ratio is of peak memory without the weights. Of ceiling: the operations that "
        "the step needs at least, by the count in lemo.bench.cost, a second, as a share of what a large matrix product "
        "reaches.</p>",
    ]
    for index, group in enumerate(found):
        body.append(f"<h2>{escape(group.title)}</h2>")
        drawn = speed_up_figure(group, f"step{index}")
        if drawn is not None:
            body.append(
                figure(drawn, "Speed-up of a step by length", f"Over {group.baseline_name} at the same length.")
            )
        body.append(html_table(_HEADS, [_cells(group, line) for line in group.lines], _WORDS))
        body += counts(group.lines)
        for line in group.lines:
            if line.parts:
                body.append(f"<h3>Where a step of {escape(line.name)} goes, {line.T:,} tokens</h3>")
                body.append(html_table(_PARTS_HEADS, _parts_cells(line), _WORDS))
    versions: dict[str, Any] = next((record.versions for record in records if record.versions), {})
    commits = ", ".join(dict.fromkeys(record.commit for record in records))
    body += ["<h2>Versions</h2>", versions_table(versions), f'<p class="small">Commit {escape(commits)}.</p>']
    return document(title, "\n".join(body), wide=True)


def step_markdown(records: Iterable[Record]) -> str:
    """GitHub tables, one for each group with a caption line."""
    parts = []
    for group in groups(records):
        rows = [[cells[0], f"`{cells[1]}`", *cells[2:]] for cells in (_cells(group, line) for line in group.lines)]
        parts.append(f"{group.title}.\n\n" + _table(_HEADS, rows))
        parts += [
            f"Where a step of `{line.name}` goes, {line.T:,} tokens, {group.title}.\n\n"
            + _table(_PARTS_HEADS, _parts_cells(line))
            for line in group.lines
            if line.parts
        ]
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def _cells(group: Group, line: Line) -> list[str]:
    if line.step_ms is None:
        time = "out of memory"
    elif line.low_ms is None or line.high_ms is None:
        time = f"{line.step_ms:,.0f}"
    else:
        time = f"{line.step_ms:,.0f} ({line.low_ms:,.0f} to {line.high_ms:,.0f})"
    return [
        f"{line.T:,}",
        line.name,
        _number(line.keep, ".3f"),
        time,
        _number(group.speed_up(line), ".2f", "×"),
        _number(line.tokens_per_s, ",.0f"),
        _number(line.peak_gib, ".2f"),
        _number(line.transient_gib, ".2f"),
        _number(group.memory_ratio(line), ".2f", "×"),
        _number(line.of_ceiling, ".0%"),
    ]


def _parts_cells(line: Line) -> list[list[str]]:
    """One row a part; what is left of the step's time is the device's idle time and the profiler's error."""
    step_ms = line.step_ms or sum(ms for _, ms, _ in line.parts)
    idle = step_ms - sum(ms for _, ms, _ in line.parts)
    return [
        [name, _number(ms, ",.1f"), _number(ms / step_ms, ".1%"), _number(floor, ",.1f")]
        for name, ms, floor in (*line.parts, ("in no part", idle, None))
    ]


def _number(value: float | None, form: str, before: str = "") -> str:
    return "n/a" if value is None else before + format(value, form)


def speed_up_figure(group: Group, name: str) -> str | None:
    """Speed-up over the baseline against length; None with fewer than two lengths.

    Args:
        group: the lines.
        name: of the figure, unique in its page.
    """
    curves = {
        method: [(line.T, up) for line in group.lines if line.name == method and (up := group.speed_up(line))]
        for method in dict.fromkeys(line.name for line in group.lines if line.name != group.baseline_name)
    }
    lengths = sorted({T for points in curves.values() for T, _ in points})
    if len(lengths) < 2:
        return None
    with style():
        drawn, axes = new_figure(3.2)
        axes.axhline(1.0, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
        for index, (method, points) in enumerate(curves.items()):
            color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=5.5, label=method)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"speed-up over {group.baseline_name}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_ylim(bottom=0)
        legend(axes, 3)
        return svg(drawn, name)
