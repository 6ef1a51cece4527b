"""The page of a calibration: what each layer keeps, what that costs, and scores predicted beside exact ones."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lemo.errors import UserError
from lemo.models.calibration import EXAMPLE_FILE, Branch, BranchFacts, Facts, read_calibration
from lemo.report.drawing import FIRST, SECOND, legend, new_figure, style, svg
from lemo.report.page import FILE, document
from lemo.report.tables import html_table
from lemo.training.storage import storage_errors, write_text

_NAMES: dict[Branch, str] = {"attention": "attention", "mlp": "MLP"}
_COLORS: dict[Branch, str] = {"attention": FIRST, "mlp": SECOND}


def build_calibration(directory: Path) -> Path:
    """Writes `report.html` into a calibration's directory; an older one is replaced.

    Raises:
        UserError: no calibration, a damaged one, or no space to write.
    """
    try:
        facts = read_calibration(directory).facts
        pictures = load_file(directory / EXAMPLE_FILE) if (directory / EXAMPLE_FILE).is_file() else {}
    except SafetensorError as error:
        raise UserError(
            f"{directory / EXAMPLE_FILE} is damaged ({error}); delete it to have the report without it"
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    path = directory / FILE
    with storage_errors(FILE, directory, "free some space, then run `lemo report` on the directory"):
        write_text(path, render(facts, pictures))
    return path


def render(facts: Facts, pictures: dict[str, np.ndarray]) -> str:
    """The whole page."""
    title = f"calibration of {Path(facts.model).name}"
    sections = (_header(facts), _shares(facts), _costs(facts), _pictures(pictures), _table(facts))
    return document(title, "\n".join(part for section in sections for part in section), wide=True)


def _header(facts: Facts) -> Iterator[str]:
    yield f"<h1>{escape(Path(facts.model).name)}, calibrated for forward mode</h1>"
    yield (
        f'<p class="sub">{facts.dtype} · blocks of {facts.block_size} tokens · score {facts.score} · fitted to '
        f"{facts.tokens:,} tokens, judged on {facts.judged_tokens:,} · {facts.seconds:,.0f} s</p>"
    )
    yield f"<p>{escape(facts.headline())}.</p>"
    for branch, found in facts.branches.items():
        shares, half, kept = sum(found.size) / sum(found.first_size), found.recall, found.recall_kept
        shrank = "" if shares == 1 else f"; predictors shrank to {shares:.0%} of their numbers"
        yield (
            f"<p>{_NAMES[branch]}: mean recall of half of the blocks {fmean(half):.3f}, lowest {min(half):.3f}, of "
            f"those kept {fmean(kept):.3f}{shrank}.</p>"
        )


def _shares(facts: Facts) -> Iterator[str]:
    yield "<h2>What each layer keeps</h2>"
    with style():
        figure, axes = new_figure(2.4)
        for branch, found in facts.branches.items():
            axes.step(range(len(found.keep)), found.keep, where="mid", color=_COLORS[branch], label=_NAMES[branch])
        axes.set(xlabel="layer", ylabel="share of tokens kept", ylim=(0, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)
        yield f"<figure>{svg(figure, 'keep')}</figure>"


def _costs(facts: Facts) -> Iterator[str]:
    yield "<h2>What half of a branch costs</h2>"
    yield "<p>Rise of the held-out loss with half of one branch's blocks left out of one layer, and nothing else.</p>"
    with style():
        figure, axes = new_figure(2.4)
        for branch, found in facts.branches.items():
            cost = [max(1e-4, value) for value in found.cost]
            axes.plot(range(len(cost)), cost, ".-", color=_COLORS[branch], label=_NAMES[branch])
        axes.set(xlabel="layer", ylabel="nats a token", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)
        yield f"<figure>{svg(figure, 'cost')}</figure>"


def _pictures(pictures: dict[str, np.ndarray]) -> Iterator[str]:
    layers = sorted({int(name.split(".")[0]) for name in pictures})
    if not layers:
        return
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    yield "<h2>Attention's block-pair scores, predicted and exact</h2>"
    yield (
        "<p>One held-out document; a row is a block of queries, a column a block of keys. Each picture's colours span "
        "its own layer's exact scores, on a square-root scale.</p>"
    )
    with style():
        figure, *axes = new_figure(2.6 * 2, columns=len(shown), rows=2)
        for column, layer in enumerate(shown):
            exact = np.sqrt(pictures[f"{layer}.exact"].astype(np.float32))
            predicted = np.sqrt(np.maximum(pictures[f"{layer}.predicted"].astype(np.float32), 0))
            top = float(np.quantile(exact[exact > 0], 0.995)) if (exact > 0).any() else 1.0
            for row, (name, values) in enumerate((("predicted", predicted), ("exact", exact))):
                panel = axes[row * len(shown) + column]
                panel.imshow(values, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
                panel.grid(visible=False)
                panel.set(title=f"layer {layer}, {name}", xticks=[], yticks=[])
        yield f"<figure>{svg(figure, 'scores')}</figure>"


def _table(facts: Facts) -> Iterator[str]:
    yield "<h2>Every layer</h2>"
    for branch, found in facts.branches.items():
        yield f"<h3>{_NAMES[branch]}</h3>"
        heads = [
            "layer",
            "keep",
            "threshold",
            "cost of half, nats",
            "recall of half",
            "of those kept",
            "predictor",
            "of its first size",
        ]
        heads += ["bypass explains"] if found.explained else []
        yield html_table(heads, [_line(found, layer) for layer in range(len(found.keep))])


def _line(found: BranchFacts, layer: int) -> list[str]:
    size, first = found.size[layer], found.first_size[layer]
    line = [
        str(layer),
        f"{found.keep[layer]:.3f}",
        f"{found.thresholds[layer]:.4g}" if found.thresholds[layer] > 0 else "all",
        f"{found.cost[layer]:+.4f}",
        f"{found.recall[layer]:.3f}",
        f"{found.recall_kept[layer]:.3f}",
        f"{size:,}",
        f"{size / first:.0%}",
    ]
    return line + ([f"{found.explained[layer]:.2f}"] if found.explained else [])
