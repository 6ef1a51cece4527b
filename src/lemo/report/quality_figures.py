"""The figures of a quality study's report, as SVG text to be put into a page. Rows carry their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from lemo.report import drawing
from lemo.report.drawing import INK, MUTED, legend, new_figure, style, svg
from lemo.report.quality_rows import METHODS, Row, Stat, Study

# Gain retained outside of these is drawn at the edge with its value, so that it doesn't squash the rest.
FLOOR, CEILING = 0.5, 1.5
# The same for losses by position, as a share of the best gain.
_WORST_LOSS = -0.5
_COLUMNS = 4
# Colour and marker of each method of METHODS: never told apart by colour alone.
_LOOKS = dict(
    zip(
        METHODS,
        (
            (INK, "*"),
            (drawing.FIRST, "o"),
            (drawing.FIRST, "v"),
            (drawing.THIRD, "s"),
            (drawing.THIRD, "<"),
            (drawing.FOURTH, "h"),
            (drawing.SECOND, "X"),
            (MUTED, "P"),
            (drawing.SIXTH, "^"),
            (drawing.FOURTH, "D"),
            (MUTED, "d"),
            (drawing.FIFTH, "p"),
        ),
        strict=True,
    )
)
_AXES = {
    "speed_up": "speed-up of a step over lora+ckpt (more is better →)",
    "memory_ratio": "peak memory / lora+ckpt's (← less is better)",
}


class Box(NamedTuple):
    """A rectangle (points)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Common area (square points)."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def look(method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    return _LOOKS.get(method, (MUTED, "h"))


def frontier(study: Study, name: str) -> str | None:
    """Gain retained against speed-up and against memory, a panel each; None if there is nothing to set against.

    Args:
        study: the rows.
        name: of the figure, unique in its page.
    """
    panels = {
        key: [(row, x, gain) for row in study.rows if (x := getattr(row, key)) and (gain := row.stat("gain_retained"))]
        for key in _AXES
    }
    panels = {key: points for key, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    with style():
        figure, *all_axes = new_figure(0.4 + 3.6 * len(panels), rows=len(panels))
        lows, highs = zip(*((gain.low, gain.high) for points in panels.values() for _, _, gain in points), strict=True)
        bottom, top = max(FLOOR, min(lows)), min(CEILING, max(highs))
        margin = 0.09 * max(top - bottom, 0.05)
        for axes, (key, points) in zip(all_axes, panels.items(), strict=True):
            axes.set_ylim(bottom - margin, top + margin)
            axes.margins(x=0.08)
            axes.axhline(1.0, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
            axes.axvline(1.0, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
            for row, x, gain in points:
                _point(axes, row, x, gain, bottom, top)
            axes.set_xlabel(_AXES[key])
            axes.set_ylabel("gain retained")
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        known = {row.method for points in panels.values() for row, _, _ in points}
        for method in [m for m in (*METHODS, *sorted(known - set(METHODS))) if m in known]:
            color, marker = look(method)
            all_axes[0].plot([], [], color=color, marker=marker, ms=6.5, linestyle="none", label=method)
        legend(all_axes[0], 4)
        figure.draw_without_rendering()  # the layout, which says where points lie
        for axes, points in zip(all_axes, panels.values(), strict=True):
            _label_points(axes, points, bottom, top)
        return svg(figure, name)


def _point(axes: Axes, row: Row, x: float, gain: Stat, bottom: float, top: float) -> None:
    """Marker and range; an arrow at the edge if the mean lies beyond it."""
    color, marker = look(row.method)
    if gain.mean < bottom or gain.mean > top:
        marker = "v" if gain.mean < bottom else "^"
    else:
        axes.vlines(x, max(gain.low, bottom), min(gain.high, top), color=color, linewidth=1.4, alpha=0.7)
    y = min(max(gain.mean, bottom), top)
    size = 10 if row.is_baseline else 6.5
    axes.plot([x], [y], color=color, marker=marker, ms=size, linestyle="none", clip_on=False, zorder=3)


def _label_points(axes: Axes, points: Sequence[tuple[Row, float, Stat]], bottom: float, top: float) -> None:
    """Writes each row's number beside its marker, clear of markers, ranges and other numbers where there is room."""
    scale = 72 / axes.figure.dpi
    frame = Box(*(float(value) * scale for value in axes.bbox.extents))
    one_x, one_y = (float(value) for value in axes.transData.transform((1.0, 1.0)) * scale)
    spots = []
    taken = [Box(one_x - 1, frame.bottom, one_x + 1, frame.top), Box(frame.left, one_y - 1, frame.right, one_y + 1)]
    for _, x, gain in points:
        px, py, low, high = (
            float(axes.transData.transform((x, min(max(y, bottom), top)))[index] * scale)
            for index, y in ((0, gain.mean), (1, gain.mean), (1, gain.low), (1, gain.high))
        )
        spots.append((px, py))
        taken += [Box(px - 4, py - 4, px + 4, py + 4), Box(px - 1, low, px + 1, high)]
    for (row, x, gain), (px, py) in zip(points, spots, strict=True):
        text = str(row.number)
        if not bottom <= gain.mean <= top:
            text += f": {100 * gain.mean:.0f}%".replace("-", "−")
        dx, dy, box = _place(px, py, 5.2 * len(text) + 1, 9.0, taken, frame)
        taken.append(box)
        far = math.hypot(dx, dy) > 15
        axes.annotate(
            text,
            xy=(x, min(max(gain.mean, bottom), top)),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=look(row.method)[0],
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 5, "shrinkB": 3}
            if far
            else None,
        ).set_in_layout(False)


def _place(
    x: float, y: float, width: float, height: float, taken: Sequence[Box], frame: Box
) -> tuple[float, float, Box]:
    """Offset (points) of a label's centre and its box: the nearest free place, or the least crowded one."""
    best: tuple[float, float, float, Box] | None = None
    for radius in (9.0, 13.0, 18.0, 24.0, 31.0, 39.0, 48.0):
        for turn in range(16):
            angle = math.pi / 4 + turn * math.pi / 8
            # Wide labels stand off sideways.
            dx, dy = (radius + width / 2 - 3) * math.cos(angle), radius * math.sin(angle)
            box = Box(x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
            crowd = sum(box.overlap(other) for other in taken) + width * height - box.overlap(frame)
            if best is None or crowd < best[0] - 1e-9:
                best = (crowd, dx, dy, box)
        if best is not None and best[0] < 1e-6:
            break
    assert best is not None
    return best[1], best[2], best[3]


def heat_maps(study: Study, name: str) -> str | None:
    """Share of right answers by depth and length: before training, and after it by every row; None without answers."""
    first = study.baseline or study.rows[0]
    panels = [("before training", first.depths("before"))]
    for row in study.rows:
        title = f"{row.number}: {row.method}" + ("" if row.setting == "default" else f"\n{row.setting}")
        panels.append((title, row.depths("after")))
        if sparse := row.depths("sparse"):
            panels.append((f"{title}, judged sparse" if "\n" in title else f"{title}\njudged sparse", sparse))
    panels = [(title, cells) for title, cells in panels if cells]
    lengths = sorted({length for _, cells in panels for length, _, _ in cells})
    depths = sorted({(start, end) for _, cells in panels for _, start, end in cells})
    if not panels:
        return None
    count = -(-len(panels) // _COLUMNS)
    with style():
        height = count * (0.55 + 0.2 * max(len(depths), 3)) + 0.5
        figure, *all_axes = new_figure(height, _COLUMNS, count, share_x=True)
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
        for index, (axes, (title, cells)) in enumerate(zip(all_axes, panels, strict=False)):
            shares = np.array([[cells.get((length, *depth), np.nan) for length in lengths] for depth in depths])
            _heat_map(axes, shares)
            axes.set_title(title, loc="left", fontsize=8.5)
            axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * a:.0f}–{100 * b:.0f}%" for a, b in depths])
            axes.tick_params(length=0, labelsize=8, labelbottom=index + _COLUMNS >= len(panels))
        figure.supxlabel("length of the text (tokens)", fontsize=9.5)
        figure.supylabel("depth of the fact", fontsize=9.5)
        return svg(figure, name)


def _heat_map(axes: Axes, shares_DL: np.ndarray) -> None:
    axes.imshow(shares_DL, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=1.0)
    axes.grid(False)
    for (depth, length), share in np.ndenumerate(shares_DL):
        if not np.isnan(share):
            # Not the page's colours: the cells are the same in light and dark.
            color = "#ffffff" if share < 0.6 else "#111111"
            axes.text(length, depth, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


def shown_by_position(study: Study) -> list[Row]:
    """One row a method, the default setting or the first, where there are at least two buckets with labels."""
    chosen: dict[str, Row] = {}
    for row in study.rows:
        if len(row.positions) > 1:
            chosen.setdefault(row.method, row)
    return list(chosen.values())


def gain_by_position(study: Study, name: str) -> tuple[str, list[str]]:
    """What training won of the held-out loss at each position, by one row a method; rows with buckets only.

    Returns:
        The figure, and what is drawn at its lower edge because it lies below.
    """
    rows = shown_by_position(study)
    gains = [np.array([_won(b.before, b.after) for b in row.positions]) for row in rows]
    best = max(float(values.max()) for values in gains)
    floor = _WORST_LOSS * best if best > 0 else -math.inf
    below = []
    with style():
        figure, axes = new_figure(3.8)
        axes.axhline(0.0, color=MUTED, linewidth=1)
        for row, values in zip(rows, gains, strict=True):
            color, marker = look(row.method)
            x = np.array([(bucket.start + bucket.end) / 2 for bucket in row.positions])
            axes.plot(
                x,
                np.maximum(values, floor),
                color=color,
                marker=marker,
                markevery=np.flatnonzero(values >= floor).tolist(),
                ms=5,
                linestyle=(0, (5, 2)) if row.is_baseline else "-",
                zorder=3 if row.is_baseline else 2,
                label=f"{row.number}: {row.name}",
            )
            if (low := float(values.min())) < floor:
                edge = x[values < floor]
                axes.plot(edge, np.full(edge.shape, floor), color=color, marker="v", ms=6.5, linestyle="none")
                below.append(f"{row.name} (down to −{-low:.3f})")
        axes.set_xlabel("position of the predicted token in its text (tokens; middle of the bucket)")
        axes.set_ylabel("loss before − after (nats)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        legend(axes, 2)
        return svg(figure, name), below


def _won(before: float | None, after: float | None) -> float:
    assert before is not None, "Row.positions has them all"
    assert after is not None, "Row.positions has them all"
    return before - after


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"
