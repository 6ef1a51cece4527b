"""The report's figures, as SVG text to be put into a page.

Drawn with matplotlib's objects, not pyplot, so nothing global changes. Colours are placeholders that become the page's
CSS variables, and text stays text in the page's font: the figures follow the reader's light or dark theme.
S steps, L layers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lemo.report.records import Bucket, Run

# matplotlib wants colours, the page has variables: each of these stands for one.
INK, MUTED, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--first", SECOND: "--second"}
_WIDTH = 7.2
_MAX_COLUMNS = 180
_SMOOTH_FROM = 60
# Any: matplotlib 3.11's stubs want its literal keys, earlier ones don't have them.
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def loss_by_step(run: Run) -> str:
    """Training loss, with the held-out loss before and after as points."""
    steps = _steps(run)
    losses = _numbers(step.loss for step in run.steps)
    with _style():
        figure, axes = _figure(3.0)
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
        _legend(axes)
        return _svg(figure, "loss")


def keep_by_layer(run: Run) -> str:
    """Share of tokens kept as a heat map, layer by step; two maps if attention and MLP differ."""
    keep_SL2 = np.array([step.keep for step in run.steps], dtype=float)
    titles = ("attention", "MLP") if run.branches_differ else ("",)
    with _style():
        height = 0.9 + max(1.6, min(4.2, 0.085 * run.layers + 0.8))
        figure, *panels = _figure(height, len(titles))
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
        return _svg(figure, "keep")


def fidelity_by_layer(run: Run) -> str:
    """Mean fidelity of each layer over the steps, its range, and the fidelity asked for."""
    values_SL = np.array([[np.nan if v is None else v for v in step.fidelity] for step in run.steps], dtype=float)
    known = ~np.isnan(values_SL).all(0)
    layers = np.flatnonzero(known)
    values_SL = values_SL[:, known]
    with _style():
        figure, axes = _figure(2.7)
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
        _legend(axes)
        return _svg(figure, "fidelity")


def memory_by_step(run: Run) -> str:
    """Peak memory of each step."""
    steps = _steps(run)
    with _style():
        figure, axes = _figure(2.7)
        reserved = _numbers(step.peak_reserved_gib for step in run.steps)
        if not np.isnan(reserved).all():
            axes.plot(steps, reserved, color=SECOND, label="reserved by the allocator", marker=_marker(steps), ms=3.5)
        peak = [step.peak_gib for step in run.steps]
        axes.plot(steps, peak, color=FIRST, label="peak", marker=_marker(steps), ms=3.5)
        axes.set_ylim(0, 1.15 * max(peak + [value for value in reserved.tolist() if value == value]))
        _step_axis(axes)
        axes.set_ylabel("memory (GiB)")
        _legend(axes)
        return _svg(figure, "memory")


def loss_by_position(buckets: Sequence[Bucket]) -> str:
    """Held-out loss before and after, by position in the document; buckets without labels are gaps."""
    with _style():
        figure, axes = _figure(2.7)
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
        _legend(axes)
        return _svg(figure, "position")


def _style() -> Any:
    return matplotlib.rc_context(_STYLE)


def _figure(height: float, panels: int = 1) -> list[Any]:
    """A figure of the page's width (inches) with panels side by side."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for one in axes:
        one.patch.set_alpha(0.0)
    return [figure, *axes]


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


def _legend(axes: Axes) -> None:
    """Above the axes, so that it hides nothing."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, len(handles)), borderaxespad=0.2, handlelength=1.6
    )


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


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose ids don't clash with another figure's."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", dpi=220, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The first tag's size in points would win over the page's; the viewBox alone keeps the shape.
    text = re.sub(r'^<svg ([^>]*?)\bheight="[^"]*"', r"<svg \1", text)
    text = re.sub(r'^<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    # Font names are in single quotes, so no match leaves the attribute. Older matplotlibs write the short `font:`.
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", text)
    # A style element inside a page would style all of it; style.css has the same rule for figures only.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.strip()
