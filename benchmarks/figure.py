"""The figure of docs/speed.svg: what a step takes and what it needs, by method, at full depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lemo.report.step import Group, Line

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
_SHAPES = {"llama-3-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B"}
_STYLE: Any = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "speed", "axes.spines.right": False}


def draw_speed(found: Sequence[Group], path: Path) -> None:
    """Bars of step time and peak memory at each shape and length measured at full depth.

    Args:
        found: groups at full depth, measured and extrapolated.
        path: SVG file to write.
    """
    panels = [(g, T) for g in found if not g.extrapolated_from for T in dict.fromkeys(line.T for line in g.lines)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 2.5 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for row, (group, T) in zip(axes, panels, strict=True):
            extrapolated = next((g for g in found if g.shape == group.shape and g.extrapolated_from), None)
            lines = [line for line in group.lines if line.T == T and line.name in _NAMES]
            _bars(row[0], lines, [(line.step_ms or 0) / 1000 for line in lines], "s", extrapolated)
            _bars(row[1], lines, [line.peak_gib or 0 for line in lines], "GiB", None)
            title = f"{_SHAPES[group.shape]}, {T // 1024}K tokens"
            row[0].set_title(f"{title}: seconds a step", loc="left", fontsize=10.5, fontweight="bold")
            row[1].set_title("peak memory, GiB (the card has 80)", loc="left", fontsize=10.5)
            row[1].set_yticklabels([])
            row[1].set_xlim(0, 80)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(axes: Axes, lines: Sequence[Line], values: Sequence[float], unit: str, beside: Group | None) -> None:
    ours = iter(_OURS)
    colors = [_COLORS.get(line.name) or next(ours) for line in lines]
    axes.barh(range(len(lines)), values, color=colors, height=0.72)
    axes.set_yticks(range(len(lines)), [_NAMES[line.name] for line in lines])
    axes.invert_yaxis()
    axes.spines[["top", "bottom"]].set_visible(False)
    axes.set_xticks([])
    baseline = next((line.step_ms for line in lines if line.is_baseline), None)
    top = max(values) if any(values) else 1.0
    for index, (line, value) in enumerate(zip(lines, values, strict=True)):
        text = f" {value:.1f} {unit}"
        if not value:
            text = " out of memory on 80 GB"
            slow = next((x for x in beside.lines if (x.T, x.name) == (line.T, line.name)), None) if beside else None
            if slow and slow.step_ms:
                text += f" (would take {slow.step_ms / 1000:.0f} s)"
        elif unit == "s" and baseline and line.step_ms and not line.is_baseline:
            text += f"   {baseline / line.step_ms:.2f}×"
        axes.text(value, index, text, va="center", fontsize=9.5)
    if unit == "s":
        axes.set_xlim(0, 1.35 * top)
