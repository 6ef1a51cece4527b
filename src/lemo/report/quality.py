"""A quality study's records as one self-contained HTML page, and as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lemo.bench import records as record_files
from lemo.bench.config import BASELINE
from lemo.bench.records import Record
from lemo.errors import UserError
from lemo.report import quality_figures as figures
from lemo.report.page import document, figure
from lemo.report.quality_rows import AGAIN, Row, Stat, Study, median_step_ms, peak_gib, studies
from lemo.report.tables import html_table, versions_table

ABOUT = {
    "sft": "long prompts, short completions, labels on the completion",
    "lm": "continued pre-training, every token labelled",
    "retrieval": "facts planted at random depths of real text, questions about them at the end",
    "extension": "continued pre-training at lengths over the model's own",
}


def quality_page(rows: Sequence[Record], source: Path) -> str:
    """The report of the quality studies among some records, of which `source` is named in messages.

    Raises:
        UserError: no record of bench `quality` among them, or a damaged one.
    """
    found = studies(rows)
    if not found:
        raise UserError(f"{source}: no record of a quality study; {AGAIN}: a JSONL file, or the study's directory")
    return render(found, sum(row.bench != "quality" for row in rows))


def record_paths(source: Path) -> list[Path]:
    """The files of records that `source` names.

    Raises:
        UserError: there are none.
    """
    if source.is_file():
        return [source]
    if (source / record_files.FILE).is_file():
        return [source / record_files.FILE]
    found = sorted(source.glob("*.jsonl"))
    if not found:
        what = "holds no .jsonl file" if source.is_dir() else "no such file or directory"
        raise UserError(f"{source}: {what}; {AGAIN}: a JSONL file, or the study's directory")
    return found


def quality_markdown(records: Iterable[Record], task: str) -> str:
    """The GitHub table of one task, with a caption line; one for each model, device, length and number of steps.

    Raises:
        UserError: a damaged record.
    """
    parts = []
    for study in studies(records):
        if study.task == task:
            columns = [column for column in _MARKDOWN if study.has(column.needs)]
            lines = [f"| {' | '.join(column.head for column in columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(column.cell(row) for column in columns)} |" for row in study.rows]
            parts.append(f"{caption(study)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def caption(study: Study) -> str:
    """One line of Markdown: model, length, training, device."""
    return f"`{Path(study.model).name}`, {_training(study)}, on {study.gpu}."


# ---- Cells ----


def range_text(stat: Stat | None, form: str = ".0%") -> str:
    """Mean, and the range if runs differ; says so if some have no value."""
    if stat is None:
        return "n/a"
    mean, low, high = (format(value, form) for value in (stat.mean, stat.low, stat.high))
    text = mean if low == high else f"{mean} ({low} to {high})"
    return _minus(text) + (f", {stat.count} of {stat.runs} runs" if stat.count < stat.runs else "")


def mean_text(stat: Stat | None, form: str) -> str:
    """The mean."""
    return "n/a" if stat is None else _minus(format(stat.mean, form))


def change_text(row: Row, before: str, after: str, form: str = ".3f") -> str:
    """Means of two keys with an arrow."""
    return f"{mean_text(row.stat(before), form)} → {mean_text(row.stat(after), form)}"


def gain_text(row: Row) -> str:
    """Gain retained, in words where training did harm."""
    return range_text(row.stat("gain_retained")) + (", harmful" if row.harmful else "")


def _step_text(row: Row) -> str:
    ms = median_step_ms(row.runs)
    return "n/a" if ms is None else f"{ms:,.0f}{_times(row.speed_up)}"


def _peak_text(row: Row) -> str:
    gib = peak_gib(row.runs)
    return "n/a" if gib is None else f"{gib:.2f}{_times(row.memory_ratio)}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" (×{ratio:.2f})"


def _seeds(row: Row) -> str:
    return str(len(row.runs))


def _markdown(text: str) -> str:
    return text.replace("|", "\\|")


def _minus(text: str) -> str:
    return text.replace("-", "−")


@dataclass(frozen=True)
class Column:
    """A column of a table of rows: its head, what a cell says, and the key without which there is no such column."""

    head: str
    cell: Callable[[Row], str]
    needs: str = "method"


_GAIN = Column("gain retained (min to max)", gain_text)
_EQUAL_TIME = Column(
    "at equal time", lambda row: range_text(row.stat("gain_retained_equal_time")), "gain_retained_equal_time"
)
_ACCURACY = Column(
    "accuracy before → after", lambda row: change_text(row, "accuracy_before", "accuracy_after"), "accuracy_after"
)
_LOSS = Column("loss before → after", lambda row: change_text(row, "loss_before", "loss_after"))
_SPARSE_LOSS = Column("sparse loss", lambda row: mean_text(row.stat("loss_after_sparse"), ".3f"), "loss_after_sparse")
_KEEP = Column("keep", lambda row: mean_text(row.stat("keep"), ".2f"))
_DENSITY = Column("density", lambda row: mean_text(row.stat("density"), ".3f"), "density")
_STEP = Column("step, ms (faster)", _step_text, "step_ms")
_PEAK = Column("peak GiB (ratio)", _peak_text, "peak_gib")
_MARKDOWN = (
    Column("#", lambda row: str(row.number)),
    Column("method", lambda row: f"`{_markdown(row.method)}`"),
    Column("setting", lambda row: _markdown(row.setting)),
    Column("seeds", _seeds),
    _KEEP,
    _DENSITY,
    _GAIN,
    _EQUAL_TIME,
    _STEP,
    _PEAK,
    _ACCURACY,
    _LOSS,
    _SPARSE_LOSS,
)
_HTML = (
    Column("", lambda row: str(row.number)),
    Column("method", lambda row: row.method),
    Column("setting", lambda row: row.setting),
    Column("seeds", _seeds),
    _KEEP,
    _DENSITY,
    Column("fidelity", lambda row: mean_text(row.stat("fidelity"), ".3f"), "fidelity"),
    _GAIN,
    _EQUAL_TIME,
    _STEP,
    _PEAK,
    _LOSS,
    _SPARSE_LOSS,
    _ACCURACY,
    Column("sparse accuracy", lambda row: mean_text(row.stat("accuracy_after_sparse"), ".3f"), "accuracy_after_sparse"),
)
# Heads of columns of words, which are set flush left.
_WORDS = ("method", "setting", "commit", "time")


# ---- Page ----


def render(found: Sequence[Study], others: int = 0) -> str:
    """The whole page.

    Args:
        found: the studies, at least one.
        others: rows of other benches in the files, which aren't shown.
    """
    tasks = ", ".join(dict.fromkeys(study.task for study in found))
    models = ", ".join(dict.fromkeys(Path(study.model).name for study in found))
    body = [
        f"<h1>{escape(models)}: quality by method</h1>",
        f'<p class="sub">Task {escape(tasks)}.</p>'
        f"<p>Every method trains the same adapter on the same batches; all are judged by the dense model on the same "
        f"held-out part. Gain retained is the held-out improvement as a share of <code>{BASELINE}</code>'s with the "
        "same seed: 100% is as good as ordinary LoRA, 0% as no training, less is harmful.</p>",
    ]
    if others:
        rows = "1 row of another bench is" if others == 1 else f"{others} rows of other benches are"
        body.append(f'<p class="small">{rows} not shown: this is a report of rows of bench quality.</p>')
    for index, study in enumerate(found):
        body += _section(study, f"study{index}")
    return document(f"{models}: quality by method ({tasks})", "\n".join(body), wide=True)


def _section(study: Study, name: str) -> Iterator[str]:
    about = f": {ABOUT[study.task]}" if study.task in ABOUT else ""
    yield f"<h2>{escape(study.task + about)}</h2>"
    seeds = sorted({run.seed for run in study.runs if run.seed is not None})
    commits = _listed(run.commit for run in study.runs)
    for facts in (
        [Path(study.model).name, study.gpu, _training(study)],
        [f"seeds {', '.join(map(str, seeds))}", f"commit {commits}"],
    ):
        yield f'<p class="sub">{escape(" · ".join(facts))}</p>'
    if study.baseline is None:
        yield (
            f'<p class="note" role="status"><strong>{BASELINE} is not there yet,</strong> so nothing can be compared '
            "with it.</p>"
        )
    yield _table(study.rows, [column for column in _HTML if study.has(column.needs)])
    yield '<p class="small">' + escape(_legend(study)) + "</p>"
    yield from _frontier(study, name)
    yield from _retrieval(study, name)
    yield from _positions(study, name)
    columns = [column for column in _RUN_COLUMNS if study.has(column.needs)]
    runs = [_single(row, run) for row in study.rows for run in row.runs]
    yield f"<details><summary>Every run, seed by seed</summary>{_table(runs, columns)}</details>"
    packages = dict.fromkeys(package for run in study.runs for package in run.versions)
    versions = {package: _listed(run.versions.get(package, "?") for run in study.runs) for package in packages}
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in dict.fromkeys(r.command for r in study.runs))
    yield f"<details><summary>Versions and command</summary>{versions_table(versions)}{commands}</details>"


def _legend(study: Study) -> str:
    parts = [f"Means over seeds, with their range in parentheses. ×: against {BASELINE}."]
    if study.has("step_ms"):
        parts.append("A step is the median, timed alone on the device.")
    if study.has("gain_retained_equal_time"):
        parts.append(f"At equal time: with as many steps as fit in {BASELINE}'s time.")
    if study.has("loss_after_sparse"):
        parts.append("Sparse: judged with tokens left out, as in training; every other figure is the dense model's.")
    if any(row.harmful for row in study.rows):
        parts.append("Harmful: the dense model is worse than before training.")
    return " ".join(parts)


def _frontier(study: Study, name: str) -> Iterator[str]:
    drawing = figures.frontier(study, f"{name}-frontier")
    if drawing is None:
        yield '<p class="small">No method has both a gain retained and a time or a memory to set it against.</p>'
        return
    text = (
        f"Numbers are the table's rows; bars span the seeds. Below {figures.FLOOR:.0%} or over {figures.CEILING:.0%} "
        "an arrow at the edge carries the value. "
    )
    if not study.has("step_ms"):
        text += "Steps weren't timed. "
    key = " · ".join(f"{row.number} {row.name}" for row in study.rows)
    yield figure(drawing, "Gain retained against speed and memory", f"{text}{key}")


def _retrieval(study: Study, name: str) -> Iterator[str]:
    drawing = figures.heat_maps(study, f"{name}-depths")
    if drawing is not None:
        text = (
            "Answers right in every token, in percent, by the dense model unless a title says sparse; means over seeds."
        )
        yield figure(drawing, "Accuracy by depth and length", text)


def _positions(study: Study, name: str) -> Iterator[str]:
    if not figures.shown_by_position(study):
        yield '<p class="small">Held-out labels lie in fewer than two position buckets, so there is no curve.</p>'
        return
    drawing, below = figures.gain_by_position(study, f"{name}-positions")
    text = "Higher is better, zero is as before training; means over seeds, one setting of each method."
    if below:
        text += f" Cut off at the lower edge: {', '.join(below)}."
    label = "What training won of the held-out loss, by position"
    yield figure(drawing, label, text)
    yield f"<details><summary>Loss by position, before and after</summary>{_positions_table(study)}</details>"


def _positions_table(study: Study) -> str:
    shown = figures.shown_by_position(study)
    first = next((row for row in shown if row.is_baseline), shown[0])
    heads = ["positions", "labels", "before", *(row.name for row in shown)]
    lines = []
    for bucket in first.positions:
        after = [next((b.after for b in row.positions if b.start == bucket.start), None) for row in shown]
        cells = [f"{bucket.start:,} to {bucket.end - 1:,}", f"{bucket.tokens // len(first.runs):,}"]
        lines.append(cells + ["n/a" if value is None else f"{value:.3f}" for value in (bucket.before, *after)])
    return html_table(heads, lines, _WORDS)


def _single(row: Row, run: Record) -> Row:
    """A row of one run."""
    return Row(row.number, row.method, row.setting, (run,), row.speed_up, row.memory_ratio)


def _key(head: str, key: str, form: str) -> Column:
    return Column(head, lambda row: mean_text(row.stat(key), form), key)


_RUN_COLUMNS = (
    *_HTML[:3],
    _key("seed", "seed", ".0f"),
    _key("keep", "keep", ".3f"),
    _key("fidelity", "fidelity", ".4f"),
    _key("loss before", "loss_before", ".4f"),
    _key("after", "loss_after", ".4f"),
    _key("gain retained", "gain_retained", ".1%"),
    _key("sparse loss", "loss_after_sparse", ".4f"),
    _key("accuracy before", "accuracy_before", ".3f"),
    _key("after", "accuracy_after", ".3f"),
    _key("sparse accuracy", "accuracy_after_sparse", ".3f"),
    _key("steps at equal time", "steps_equal_time", ",.0f"),
    _key("loss after", "loss_after_equal_time", ".4f"),
    _key("gain retained", "gain_retained_equal_time", ".1%"),
    _key("step, ms", "step_ms", ",.1f"),
    _key("min", "step_ms_min", ",.1f"),
    _key("max", "step_ms_max", ",.1f"),
    _key("tokens/s", "tokens_per_s", ",.0f"),
    _key("peak GiB", "peak_gib", ".2f"),
    _key("reserved", "peak_reserved_gib", ".2f"),
    _key("training, s", "wall_s", ",.0f"),
    _key("processes", "concurrent", ".0f"),
    Column("commit", lambda row: row.runs[0].commit),
    Column("time", lambda row: row.runs[0].time),
)


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    heads = [column.head for column in columns]
    return html_table(heads, [[column.cell(row) for column in columns] for row in rows], _WORDS)


def _training(study: Study) -> str:
    return f"T = {study.T:,}, {study.steps:,} steps with a batch of {study.batch}"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
