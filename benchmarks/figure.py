"""The figures of docs/: what a step takes and needs at full depth, and what each method of a quality study retains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed import OUT, SHAPES, Depth
from lemo.bench.step_config import STRONG_BASELINE
from lemo.report.drawing import standalone
from lemo.report.quality_figures import frontier, heat_maps
from lemo.report.quality_rows import Study
from lemo.report.step import Line

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLORS = {"lora+ckpt": "#7f7f7f", "lora+ckpt+liger": "#b0b0b0"}
_OURS = ("#0072b2", "#56b4e9", "#009e73", "#7fd1b9")
_NAMES = {
    "lora+ckpt": "LoRA, checkpointing",
    "lora+ckpt+liger": "the same with Liger's kernels",
    "lemo-backward, spread 0.25": "LeMo, 25% kept, evenly spread",
    "lemo-backward, spread 0.125": "LeMo, 12.5% kept, evenly spread",
    "lemo-backward, recorded 0.25": "LeMo, 25% kept, placed as in SmolLM2",
    "lemo-backward, recorded 0.125": "LeMo, 12.5% kept, placed as in SmolLM2",
}
_STYLE: Any = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "speed", "axes.spines.right": False}


def draw_speed(found: Sequence[Depth], path: Path) -> None:
    """Bars of step time and peak memory at each shape and length measured at full depth.

    Args:
        found: what was measured at full depth.
        path: SVG file to write; nothing is written if nothing was measured.
    """
    panels = [(depth, T) for depth in found for T in dict.fromkeys(line.T for line in depth.measured.lines)]
    if not panels:
        return
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 2.2 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(1.25, 1))
        for row, (depth, T) in zip(axes, panels, strict=True):
            lines = [line for line in depth.measured.lines if line.T == T and line.name in _NAMES]
            _bars(row[0], lines, [(line.step_ms or 0) / 1000 for line in lines], [_time(depth, x) for x in lines])
            _bars(row[1], lines, [line.peak_gib or 0 for line in lines], [_memory(depth, x) for x in lines])
            title = f"{SHAPES[depth.measured.shape]}, {T // 1024}K tokens: seconds a step"
            row[0].set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            row[0].set_xlim(0, 1.5 * max(line.step_ms or 1 for line in lines) / 1000)
            row[1].set_title("peak memory, GiB (the card has 80)", loc="left", fontsize=10.5)
            row[1].set_yticks([])
            row[1].set_xlim(0, 80)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_frontier(study: Study, path: Path) -> None:
    """Gain retained against speed-up and against memory; points carry the numbers of the table's rows.

    Args:
        study: of one task.
        path: SVG file to write; nothing is written if nothing was measured.
    """
    _write(frontier(study, study.task), path)


def draw_depths(study: Study, path: Path) -> None:
    """Share of right answers by depth and length, before training and after it by every row.

    Args:
        study: of one task.
        path: SVG file to write; nothing is written for a task without answers.
    """
    _write(heat_maps(study, study.task), path)


def _write(text: str | None, path: Path) -> None:
    if text:
        path.write_text(standalone(text), encoding="utf-8")


def _time(depth: Depth, line: Line) -> str:
    """A bar's label: the time, and how many times as fast as the strong baseline that is."""
    if line.step_ms is None:
        _, further = depth.lines(line.T, line.name)
        would = f" (it would take {further.step_ms / 1000:.0f} s)" if further and further.step_ms else ""
        return f"{OUT}{would}"
    theirs, mark = depth.step_ms(line.T, STRONG_BASELINE)
    up = (
        f"{'about ' if mark else ''}{theirs / line.step_ms:{'.1f' if mark else '.2f'}}×"
        if theirs and not line.is_baseline
        else ""
    )
    return f"{line.step_ms / 1000:.1f} s   {up}".rstrip()


def _memory(depth: Depth, line: Line) -> str:
    if line.peak_gib is not None:
        return f"{line.peak_gib:.1f} GiB"
    _, further = depth.lines(line.T, line.name)
    return f"{OUT} (it would need {further.peak_gib:.0f} GiB)" if further and further.peak_gib else OUT


def _bars(axes: Axes, lines: Sequence[Line], values: Sequence[float], labels: Sequence[str]) -> None:
    ours = iter(_OURS)
    colors = [_COLORS.get(line.name) or next(ours) for line in lines]
    axes.barh(range(len(lines)), values, color=colors, height=0.72)
    axes.set_yticks(range(len(lines)), [_NAMES[line.name] for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines[["top", "bottom"]].set_visible(False)
    axes.set_xticks([])
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.text(value, index, f" {label}", va="center", fontsize=9.5)
