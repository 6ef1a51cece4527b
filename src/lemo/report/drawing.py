"""What the reports' figures share: size, style, and the way to SVG text that is put into a page.

Drawn with matplotlib's objects, not pyplot, so nothing global changes. Colours are placeholders that become the page's
CSS variables, and text stays text in the page's font: the figures follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib wants colours, the page has variables: each of these stands for one.
INK, MUTED, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
THIRD, FOURTH, FIFTH, SIXTH = "#060606", "#070707", "#080808", "#090909"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
    FOURTH: "--fourth",
    FIFTH: "--fifth",
    SIXTH: "--sixth",
}
_WIDTH = 7.2
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


def style() -> Any:
    """Context in which figures are drawn and written."""
    return matplotlib.rc_context(_STYLE)


def new_figure(height: float, columns: int = 1, rows: int = 1, *, share_x: bool = False) -> list[Any]:
    """A figure of the page's width and its panels, row by row.

    Args:
        height: of the figure (inches).
        columns, rows: of panels, which share the y axis, and the x axis if `share_x`.
    """
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False).flatten().tolist()
    for one in axes:
        one.patch.set_alpha(0.0)
    return [figure, *axes]


def legend(axes: Axes, columns: int = 5) -> None:
    """Above the axes, so that it hides nothing."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=max(1, min(columns, len(handles))),
        borderaxespad=0.2,
        handlelength=1.6,
    )


# The page's light theme, for a figure that stands alone.
_LIGHT = (
    "svg { --ink: #1d2126; --muted: #646c76; --line: #e1e3e6; --first: #1f63b0; --second: #c2560c; --third: #12855f; "
    "--fourth: #7d4cc2; --fifth: #c02f77; --sixth: #8a6d00; --sans: system-ui, 'DejaVu Sans', Arial, sans-serif; "
    "background: #ffffff; } * { stroke-linejoin: round; stroke-linecap: butt; }"
)


def standalone(text: str) -> str:
    """`svg`'s element as a file of its own, in the page's light colours."""
    opening, closed, rest = text.partition(">")
    return f"{opening}{closed}<style>{_LIGHT}</style>{rest}\n"


def svg(figure: Figure, name: str) -> str:
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
