"""Puts a run's records together as one self-contained HTML page: what came out, how it went, with what settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path

import yaml

from lemo.report import figures
from lemo.report.records import Run, RunSummary, Step, read_run
from lemo.report.tables import data_table, steps_table, versions_table
from lemo.training.storage import storage_errors, write_text

FILE = "report.html"

MODES = {
    "backward": "forward pass and loss are exact; only kept blocks of tokens are recomputed and back-propagated",
    "forward": "eliminated blocks of tokens skip a branch in the forward and the backward pass, which changes the loss",
    "dense": "no token is left out",
}


def build(run_dir: Path) -> Path:
    """Writes `report.html` into a run directory; an older one is replaced.

    A run without `summary.json` gets a report too, which says that it isn't finished.

    Args:
        run_dir: directory that `lemo finetune` wrote.

    Returns:
        Path of the report.

    Raises:
        UserError: not a run directory, a damaged record (named with its line), or no space to write.
    """
    run = read_run(run_dir)
    path = run_dir / FILE
    with storage_errors(FILE, run_dir, "free some space, then run `lemo report` on the directory"):
        write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The whole page."""
    title = f"{run.name}: {run.config.sparsity.mode} run of {run.config.model.name}"
    sections = (_header, _tiles, _learning, _left_out, _memory, _completion, _data, _steps, _settings)
    return document(title, "\n".join(part for section in sections for part in section(run)))


def write_page(html: str, source: Path, output: Path | None) -> Path:
    """Writes a report of records: to `output`, or `report.html` in the directory `source`, or beside the file.

    Raises:
        UserError: it can't be written.
    """
    path = output or (source / FILE if source.is_dir() else source.with_suffix(".html"))
    with storage_errors(path.name, path.parent, "choose a place that can be written, then run `lemo report` again"):
        write_text(path, html)
    return path


def document(title: str, body: str, *, wide: bool = False) -> str:
    """A page in the reports' look.

    Args:
        title: plain text.
        body: HTML.
        wide: leave room for tables of many columns.
    """
    main = '<main class="wide">' if wide else "<main>"
    style = files("lemo.report").joinpath("style.css").read_text(encoding="utf-8")
    # Text from outside can hold half a surrogate pair, which UTF-8 has no bytes for.
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{main}\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def _header(run: Run) -> Iterator[str]:
    config, summary = run.config, run.summary
    yield f"<h1>{escape(Path(config.model.name).name)}, {escape(config.sparsity.mode)} mode</h1>"
    facts = [
        f"run {run.name}",
        f"up to {config.data.max_tokens:,} tokens a sequence",
        f"LoRA rank {config.lora.r}",
        f"seed {config.training.seed}",
    ]
    if summary and summary.device:
        facts.append(summary.device + (f" × {summary.processes}" if summary.processes > 1 else ""))
    yield f'<p class="sub">{escape(" · ".join(facts))}</p>'
    mode = config.sparsity.mode
    yield f'<p class="sub">Mode {mode}: {MODES[mode]}.</p>'
    if summary is None:
        done = f"{len(run.steps)} of {config.training.steps} steps are recorded"
        yield (
            f'<p class="note" role="status"><strong>This run is not finished.</strong> {done}; there is no held-out '
            "result and no adapter yet.</p>"
        )


def _tiles(run: Run) -> Iterator[str]:
    summary = run.summary
    tiles = list(_finished_tiles(run, summary) if summary else _unfinished_tiles(run))
    if tiles:
        yield '<dl class="tiles">\n' + "\n".join(tiles) + "\n</dl>"


def _finished_tiles(run: Run, summary: RunSummary) -> Iterator[str]:
    if summary.loss_before is not None and summary.loss_after is not None:
        change = summary.loss_after - summary.loss_before
        value = f"{summary.loss_before:.4f} <small>→</small> {summary.loss_after:.4f}"
        count = f", {_documents(summary.heldout_documents)}" if summary.heldout_documents else ""
        kind = "good" if change < 0 else "bad"
        more = f'<span class="{kind}">{_signed(change)}</span> nats per label, by the dense model{count}'
        yield _tile("held-out loss", value, more, wide=True)
    yield _tile(
        "tokens kept", f"{100 * summary.keep_mean:.1f} <small>%</small>", "mean over steps, layers and branches"
    )
    if summary.fidelity_mean is not None:
        yield _tile("fidelity", f"{summary.fidelity_mean:.3f}", _asked(run))
    yield _tile(
        "speed",
        f"{summary.tokens_per_s:,.0f} <small>tokens/s</small>",
        f"{summary.tokens:,} tokens, {summary.labelled_tokens:,} of them labelled, in {summary.steps} steps",
        wide=True,
    )
    yield _tile("peak memory", f"{summary.peak_gib:.2f} <small>GiB</small>", _memory_meaning(run))
    if summary.wall_s is not None:
        yield _tile("time", _duration(summary.wall_s), "evaluation included")


def _unfinished_tiles(run: Run) -> Iterator[str]:
    if not run.steps:
        return
    first, last = run.steps[0], run.steps[-1]
    value = f"{_loss(first)} <small>→</small> {_loss(last)}"
    yield _tile("training loss", value, f"step {first.step} and step {last.step}, nats per label", wide=True)
    yield _tile(
        "tokens kept", f"{100 * statistics.fmean(s.keep_mean for s in run.steps):.1f} <small>%</small>", "so far"
    )
    fidelities = [s.fidelity_mean for s in run.steps if s.fidelity_mean is not None]
    if fidelities:
        yield _tile("fidelity", f"{statistics.fmean(fidelities):.3f}", _asked(run))
    speeds = [s.tokens_per_s for s in run.steps if s.tokens_per_s is not None]
    if speeds:
        yield _tile("speed", f"{statistics.median(speeds):,.0f} <small>tokens/s</small>", "median of the steps")
    yield _tile("peak memory", f"{max(s.peak_gib for s in run.steps):.2f} <small>GiB</small>", _memory_meaning(run))


def _learning(run: Run) -> Iterator[str]:
    yield "<h2>Learning</h2>"
    if not run.steps:
        yield "<p>No step is recorded yet.</p>"
        return
    caption = (
        "Loss of the training batch at each optimizer step"
        + (", which is exact in this mode" if run.config.sparsity.mode == "backward" else "")
        + ". Batches hold different documents, so the curve jumps; what counts is the held-out loss."
    )
    yield figure(figures.loss_by_step(run), "Training loss by step", caption)
    buckets = run.summary.by_position if run.summary else []
    measured = [bucket for bucket in buckets if bucket.before is not None and bucket.after is not None]
    if len(measured) > 1:
        caption = "Held-out loss of the dense model by position in the document; a lower line after training is better."
        yield figure(figures.loss_by_position(measured), "Held-out loss by position, before and after", caption)
    elif measured:
        only = measured[0]
        yield (
            f"<p>All {only.tokens:,} held-out labels lie at positions {only.start:,} to {only.end - 1:,} of their "
            "documents, so there is no curve by position.</p>"
        )


def _left_out(run: Run) -> Iterator[str]:
    if not run.steps or run.config.sparsity.mode == "dense":
        return
    yield "<h2>What took part</h2>"
    keeps = [share for step in run.steps for pair in step.keep for share in pair]
    branches = "" if run.branches_differ else " Attention and MLP keep the same blocks here."
    tokens = run.config.sparsity.tokens_per_block
    unit = "single tokens" if tokens == 1 else f"blocks of {tokens} tokens"
    caption = (
        f"Share of each batch's tokens that a layer kept, from {100 * min(keeps):.1f}% to {100 * max(keeps):.1f}%; "
        f"{unit}.{branches}"
    )
    yield figure(figures.keep_by_layer(run), "Kept share of tokens by layer and step", caption)
    if run.has_fidelity:
        caption = (
            "Fidelity: the share of the squared gradient norm at a layer's output that the kept blocks hold. It is "
            "local to each layer."
        )
        yield figure(figures.fidelity_by_layer(run), "Fidelity by layer", caption)
    else:
        yield f'<p class="small">Mode {run.config.sparsity.mode} measures no fidelity.</p>'
    agreement = (run.summary and run.summary.gradient_agreement) or {}
    if {"cosine", "norm_ratio"} <= agreement.keys():
        yield (
            f"<p>The trained model's gradient against the dense one, on {agreement.get('sequences', 0):.0f} training "
            f"sequences: cosine {agreement['cosine']:.3f}, norm ratio {agreement['norm_ratio']:.3f}.</p>"
        )


def _memory(run: Run) -> Iterator[str]:
    if not run.steps:
        return
    yield "<h2>Memory</h2>"
    yield figure(figures.memory_by_step(run), "Peak memory by step", f"Peak of each step: {_memory_meaning(run)}.")


def _completion(run: Run) -> Iterator[str]:
    sample = run.summary.sample if run.summary else None
    if sample is None:
        return
    yield "<h2>One held-out completion</h2>"
    yield "<p>Greedy decoding by the dense model, before and after training. One example shows style, not quality.</p>"
    yield f'<div class="texts"><div><h3>End of the prompt</h3><pre>{_text(sample.prompt_tail)}</pre></div></div>'
    columns = (
        ("What the document says", sample.reference),
        ("Before training", sample.before),
        ("After training", sample.after),
    )
    cells = "".join(f"<div><h3>{name}</h3><pre>{_text(text)}</pre></div>" for name, text in columns)
    yield f'<div class="texts">{cells}</div>'


def _data(run: Run) -> Iterator[str]:
    table = data_table(run.summary.data) if run.summary else None
    if table:
        yield "<h2>Data</h2>"
        yield table


def _steps(run: Run) -> Iterator[str]:
    if run.steps:
        yield "<h2>Steps</h2>"
        yield f"<details><summary>Numbers behind the plots</summary>{steps_table(run.steps)}</details>"


def _settings(run: Run) -> Iterator[str]:
    yield "<h2>Settings</h2>"
    text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    yield f"<details><summary>Resolved configuration</summary><pre>{escape(text)}</pre></details>"
    if run.summary:
        yield versions_table(run.summary.versions)


def figure(svg: str, label: str, caption: str) -> str:
    """A figure with its caption; label and caption are plain text."""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f"<figure>\n{svg}\n<figcaption><strong>{escape(label)}.</strong> {escape(caption)}</figcaption>\n</figure>"


def _tile(name: str, value: str, more: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f'<div{kind}><dt>{name}</dt><dd class="value">{value}</dd><dd class="more">{more}</dd></div>'


def _asked(run: Run) -> str:
    sparsity = run.config.sparsity
    if sparsity.mode == "backward" and sparsity.policy == "energy":
        cap = f", at most {100 * sparsity.keep:g}% of the blocks" if sparsity.keep is not None else ""
        return f"{sparsity.fidelity:g} asked for{cap}"
    return "share of gradient energy kept"


def _memory_meaning(run: Run) -> str:
    if any(step.peak_reserved_gib is not None for step in run.steps):
        return "tensors on the device"
    return "the whole process since its start, weights and libraries included"


def _documents(count: int) -> str:
    return f"{count} document{'s' if count != 1 else ''}"


def _loss(step: Step) -> str:
    return "not finite" if step.loss is None else f"{step.loss:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} <small>s</small>"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} <small>h</small> {minutes} <small>min</small>" if hours else f"{minutes} <small>min</small>"


def _text(text: str) -> str:
    return escape(text) or '<span class="small">(nothing)</span>'
