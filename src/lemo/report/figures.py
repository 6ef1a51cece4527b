"""The figures of a run's report, as SVG text to be put into a page.

S steps, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lemo.report.drawing import FIRST, SECOND, legend, new_figure, style, svg
from lemo.report.records import Bucket, Run

_MAX_COLUMNS = 180
_SMOOTH_FROM = 60


def loss_by_step(run: Run) -> str:
    """Training loss, with the held-out loss before and after as points."""
    steps = _steps(run)
    losses = _numbers(step.loss for step in run.steps)
    with style():
        figure, axes = new_figure(3.0)
        smooth = len(steps) >= _SMOOTH_FROM
        axes.plot(
            steps, losses, color=FIRST, alpha=0.4 if smooth else 1, label="training loss", marker=_marker(steps), ms=3.5
        )
        if smooth:
            window = len(steps) // 20
            axes.plot(steps, _moving_mean(losses, window), color=FIRST, label=f"its mean over {window} steps")
        if run.summary and run.summary.loss_before is not None and run.summary.loss_after is not None:
            axes.plot(
                [0, steps[-1]],
                [run.summary.loss_before, run.summary.loss_after],
                linestyle="none",
                marker="D",
                color=SECOND,
                ms=5.5,
                label="held-out loss, dense model",
                clip_on=False,
            )
        _step_axis(axes)
        axes.set_ylabel("loss (nats per label)")
        legend(axes)
        return svg(figure, "loss")


def keep_by_layer(run: Run) -> str:
    """Share of tokens kept as a heat map, layer by step; two maps if attention and MLP differ."""
    keep_SL2 = np.array([step.keep for step in run.steps], dtype=float)
    titles = ("attention", "MLP") if run.branches_differ else ("",)
    with style():
        height = 0.9 + max(1.6, min(4.2, 0.085 * run.layers + 0.8))
        figure, *panels = new_figure(height, len(titles))
        vmax = float(keep_SL2.max())
        image: Any = None
        for branch, (axes, title) in enumerate(zip(panels, titles, strict=True)):
            cells_LS, edges = _binned(keep_SL2[:, :, branch].T, _steps(run))
            image = axes.imshow(
                cells_LS,
                aspect="auto",
                origin="lower",
                interpolation="nearest",
                cmap="viridis",
                vmin=0.0,
                vmax=vmax,
                extent=(edges[0], edges[-1], -0.5, run.layers - 0.5),
            )
            axes.grid(False)
            axes.set_title(title, loc="left", fontsize=9.5)
            _step_axis(axes)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        panels[0].set_ylabel("layer (0 is next to the input)")
        bar = figure.colorbar(image, ax=panels, pad=0.02, aspect=24)
        bar.set_label("kept share of tokens")
        bar.outline.set_visible(False)
        return svg(figure, "keep")


def fidelity_by_layer(run: Run) -> str:
    """Mean fidelity of each layer over the steps, its range, and the fidelity asked for."""
    values_SL = np.array([[np.nan if v is None else v for v in step.fidelity] for step in run.steps], dtype=float)
    known = ~np.isnan(values_SL).all(0)
    layers = np.flatnonzero(known)
    values_SL = values_SL[:, known]
    with style():
        figure, axes = new_figure(2.7)
        mean, low, high = (f(values_SL, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
        axes.vlines(layers, low, high, color=FIRST, alpha=0.35, linewidth=4, label="range over the steps")
        axes.plot(layers, mean, color=FIRST, marker="o", ms=3.5, label="mean over the steps")
        if run.config.sparsity.mode == "backward" and run.config.sparsity.policy == "energy":
            asked = run.config.sparsity.fidelity
            axes.axhline(asked, color=SECOND, linestyle=(0, (4, 3)), linewidth=1.3, label=f"asked for: {asked:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer (0 is next to the input)")
        axes.set_ylabel("fidelity")
        axes.margins(y=0.12)
        legend(axes)
        return svg(figure, "fidelity")


def memory_by_step(run: Run) -> str:
    """Peak memory of each step."""
    steps = _steps(run)
    with style():
        figure, axes = new_figure(2.7)
        reserved = _numbers(step.peak_reserved_gib for step in run.steps)
        if not np.isnan(reserved).all():
            axes.plot(steps, reserved, color=SECOND, label="reserved by the allocator", marker=_marker(steps), ms=3.5)
        peak = [step.peak_gib for step in run.steps]
        axes.plot(steps, peak, color=FIRST, label="peak", marker=_marker(steps), ms=3.5)
        axes.set_ylim(0, 1.15 * max(peak + [value for value in reserved.tolist() if value == value]))
        _step_axis(axes)
        axes.set_ylabel("memory (GiB)")
        legend(axes)
        return svg(figure, "memory")


def loss_by_position(buckets: Sequence[Bucket]) -> str:
    """Held-out loss before and after, by position in the document; buckets without labels are gaps."""
    with style():
        figure, axes = new_figure(2.7)
        for key, color, label in (("before", SECOND, "before"), ("after", FIRST, "after")):
            for bucket in buckets:
                value = getattr(bucket, key)
                if value is not None:
                    axes.plot([bucket.start, bucket.end], [value, value], color=color, linewidth=2.6, label=label)
                    label = "_nolegend_"
        axes.set_xlabel("position of the predicted token in its document (tokens)")
        axes.set_ylabel("held-out loss (nats per label)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(y=0.15)
        legend(axes)
        return svg(figure, "position")


def _steps(run: Run) -> list[int]:
    return [step.step for step in run.steps]


def _numbers(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _marker(steps: Sequence[int]) -> str:
    """Points where they can be told apart, so that a run of one step shows something."""
    return "o" if len(steps) <= 40 else ""


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if len(axes.figure.axes) > 1 else 10))
    axes.set_xlabel("optimizer step")


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` numbers, fewer at the start; NaN where all are."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0).cumsum(), known.cumsum()
    sums[window:] -= sums[:-window].copy()
    counts = counts.copy()
    counts[window:] -= known.cumsum()[:-window]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _binned(values_LS: np.ndarray, steps: Sequence[int]) -> tuple[np.ndarray, list[float]]:
    """At most `_MAX_COLUMNS` columns, each the mean of neighbouring steps; and the columns' outer edges."""
    columns = min(_MAX_COLUMNS, len(steps))
    groups = np.array_split(np.arange(len(steps)), columns)
    return np.stack([values_LS[:, group].mean(1) for group in groups], 1), [steps[0] - 0.5, steps[-1] + 0.5]
