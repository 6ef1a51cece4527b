"""One figure of what the paper draws and we measured too: memory, a step's time, rows moved, the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.paper import (
    GB,
    MEMORY,
    NAIVE,
    NAMES,
    STEP,
    Pair,
    cards,
    losses,
    movements,
    pairs,
    speed_ups,
)
from lemo.report.ops import OpLine

# Okabe and Ito's colours, which the colour-blind tell apart; shapes of markers tell the same.
_LORA, _OURS, _OTHER, _PAPER = "#8c8c8c", "#0072b2", "#009e73", "#d55e00"
_STYLE: Any = {
    "font.size": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "paper",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}
_DIAMOND: Any = {"color": _PAPER, "marker": "D", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8}
_CARD_GIB = 80


def draw_paper(results: Path, path: Path) -> None:
    """The paper's values as diamonds, ours as bars and lines; a panel without records stays empty.

    Args:
        results: folder of records.
        path: SVG file to write; nothing is written without any step of ours.
    """
    found = pairs(results)
    places = [place for place in MEMORY if place in found]
    if not places:
        return
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 5.6 + 0.42 * len(places)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        (memory, time), (rows, loss) = figure.subplots(2, 2, height_ratios=(0.45 * len(places) + 1.2, 3.2))
        _memory(memory, [(place, found[place]) for place in places])
        _time(time, found, pairs(results, checkpointed=True))
        moved, logits = movements(results), losses(results, "logits")
        rows.set_visible(bool(moved))
        loss.set_visible(bool(logits))
        if moved:
            _rows(rows, moved)
        if logits:
            _loss(loss, logits, losses(results, "lemo"))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _title(axes: Axes, text: str, below: str) -> None:
    axes.set_title(f"{text}\n", loc="left", fontsize=10.5, fontweight="bold")
    axes.text(0, 1.03, below, transform=axes.transAxes, fontsize=8.8, color="#444444")


def _memory(axes: Axes, found: Sequence[tuple[tuple[str, int], Pair]]) -> None:
    """Two bars a shape and length, each with the paper's diamond."""
    labels = []
    for index, (place, pair) in enumerate(found):
        theirs = MEMORY[place]
        for offset, color, row, paper in ((-0.19, _LORA, pair.lora, theirs[0]), (0.19, _OURS, pair.half, theirs[1])):
            value = row.peak_reserved_gib
            axes.barh(index + offset, value or 0, height=0.36, color=color)
            inside = {"color": "white", "ha": "right"} if value else {"color": color, "ha": "left"}
            text = f"{value:.1f} " if value else " out of memory"
            axes.text(value or 0, index + offset, text, va="center", fontsize=8.8, **inside)
            if paper is not None:
                axes.plot(paper * GB, index + offset, linestyle="none", **_DIAMOND)
        labels.append(f"{NAMES[place[0]]}\n{place[1] // 1024}K tokens")
    axes.set_yticks(range(len(found)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, _CARD_GIB)
    axes.grid(axis="x")
    _title(axes, "Peak memory of a step, GiB reserved", "no gradient checkpointing")
    card = cards(pair.half for _, pair in found)
    axes.legend(
        handles=[
            Patch(color=_LORA, label=f"LoRA, {card}"),
            Patch(color=_OURS, label=f"half kept, {card}"),
            Line2D([], [], linestyle="none", label="the paper's, A800", **_DIAMOND),
        ],
        loc="upper center",
        bbox_to_anchor=(0.42, -0.1),
        ncols=3,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _time(axes: Axes, plain: dict[tuple[str, int], Pair], checkpointed: dict[tuple[str, int], Pair]) -> None:
    axes.axhline(1.0, color="#9a9a9a", linewidth=1, linestyle=(0, (2, 3)))
    times = speed_ups(STEP["llama-2-7b"])
    axes.plot(*zip(*times, strict=True), linewidth=1.4, label="the paper's Llama-2-7B, A800, checkpointed", **_DIAMOND)
    lengths = [T for T, _ in times]
    series = (
        ("llama-2-7b", plain, _OURS, "o", ", not checkpointed"),
        ("llama-3-8b", plain, _OTHER, "s", ", not checkpointed"),
        ("llama-3-8b", checkpointed, _OTHER, "^", ", checkpointed"),
    )
    for shape, found, color, marker, words in series:
        points = sorted((T, pair.speed_up) for (name, T), pair in found.items() if name == shape and pair.speed_up)
        if points:
            layers = {pair.layers for (name, _), pair in found.items() if name == shape and not pair.all_layers}
            depth = f", {max(layers)} layers" if layers else ""
            label = f"{NAMES[shape]}, {cards(pair.half for pair in found.values())}{words}{depth}"
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=6, linewidth=1.6, label=label)
            lengths += [T for T, _ in points]
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.grid(axis="y")
    _lengths(axes, lengths)
    _title(axes, "Speed-up of a step over LoRA", "half of the blocks kept; above 1× is faster")
    axes.set_ylim(0, 1.2 * max(axes.get_ylim()[1], 2.5))
    axes.legend(loc="upper left", fontsize=8.8)


def _rows(axes: Axes, lines: Sequence[OpLine]) -> None:
    axes.axhspan(*NAIVE, color=_PAPER, alpha=0.14, linewidth=0)
    axes.text(
        0.98, 22, "the paper's claim, A800: 10 to 50×", transform=axes.get_yaxis_transform(), ha="right", color=_PAPER
    )
    kinds = (("movement: read, norm, add", "forward", _OURS), ("movement: backward", "backward", _OTHER))
    for op, words, color in kinds:
        for keep, marker, style in ((0.25, "o", "-"), (0.5, "s", "--")):
            points = [
                (line.row.T or 0, line.speed_up)
                for line in lines
                if line.details.op == op and line.row.keep == keep and line.speed_up
            ]
            if points:
                look: Any = {"color": color, "marker": marker, "linestyle": style, "linewidth": 1.6, "markersize": 5.5}
                axes.plot(*zip(*points, strict=True), label=f"{words}, {keep:g} kept", **look)
    axes.axhline(1.0, color="#9a9a9a", linewidth=1, linestyle=(0, (2, 3)))
    axes.set_yscale("log")
    axes.set_ylim(0.35, 60)
    axes.set_yticks([1, 2, 5, 10, 20, 50], [f"{up}×" for up in (1, 2, 5, 10, 20, 50)])
    axes.grid(axis="y")
    _lengths(axes, [line.row.T or 0 for line in lines])
    below = f"index, zeros, scatter, add; width 4,096, {cards(line.row for line in lines)}"
    _title(axes, "Rows moved in place, over the naive way", below)
    axes.legend(loc="lower right", ncols=2, fontsize=8.8)


def _loss(axes: Axes, logits: Sequence[OpLine], segments: Sequence[OpLine]) -> None:
    small: Any = {"ha": "center", "fontsize": 8.8}
    looks = ((logits, "all logits at once", _LORA, "s"), (segments, "in segments", _OURS, "o"))
    for lines, words, color, marker in looks:
        points = [(line.row.T or 0, line.details.above_gib) for line in lines if line.details.above_gib]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=6, linewidth=1.6, label=words)
        for T, gib in points:
            text = f"{gib:.2g}" if gib < 1 else f"{gib:.0f}"
            axes.annotate(text, (T, gib), (0, 7), textcoords="offset points", **small)
    for line in logits:
        if line.details.above_gib is None:
            axes.annotate("out of\nmemory", (line.row.T or 0, _CARD_GIB), color=_LORA, va="center", **small)
    axes.set_yscale("log")
    axes.set_ylim(0.05, 200)
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.grid(axis="y")
    _lengths(axes, [line.row.T or 0 for line in (*logits, *segments)])
    vocabulary = str(logits[0].row.shape).partition(", ")[2]
    below = f"{vocabulary}, {cards(line.row for line in logits)}; the paper says 15% of a step's peak"
    _title(axes, "The loss: GiB beyond its in- and outputs", below)
    axes.legend(loc="center right", fontsize=8.8)


def _lengths(axes: Axes, lengths: Sequence[int]) -> None:
    ticks = sorted(T for T in set(lengths) if T & (T - 1) == 0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{T // 1024}K" for T in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    if ticks:
        axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
