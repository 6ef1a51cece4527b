"""The report's tables, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lemo.report.records import Step

MAX_ROWS = 200


def data_table(data: Mapping[str, Any]) -> str | None:
    """What became of every document (`DataReport.as_dict`), training beside held-out; None if nothing is known."""
    parts = [data.get("train"), data.get("heldout")]
    if not all(isinstance(part, Mapping) for part in parts):
        return None
    rows = []
    for label, cell in _DATA_ROWS:
        cells = [cell(part) for part in parts if part is not None]
        # A row that says nothing in both columns would only be in the way.
        if not (label.startswith(" ") and set(cells) <= {"0", "-"}):
            kind = ' class="inner"' if label.startswith(" ") else ""
            rows.append(f"<tr><td{kind}>{label.strip()}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    notes = "".join(f'<p class="small">{escape(str(note))}</p>' for note in data.get("notes") or ())
    return (
        '<div class="scroll"><table><thead><tr><th scope="col"><span class="small">documents, unless it says '
        'tokens</span></th><th scope="col">train</th><th scope="col">held-out</th></tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div>"
        + notes
    )


def steps_table(steps: Sequence[Step]) -> str:
    """One row a step, thinned to `MAX_ROWS`."""
    stride = -(-len(steps) // MAX_ROWS)
    columns: tuple[tuple[str, Callable[[Step], str]], ...] = (
        ("step", lambda s: str(s.step)),
        ("loss", lambda s: _number(s.loss, ".4f")),
        ("learning rate", lambda s: _number(s.lr, ".2e")),
        ("gradient norm", lambda s: _number(s.grad_norm, ".3f")),
        ("tokens", lambda s: f"{s.tokens:,}"),
        ("tokens/s", lambda s: _number(s.tokens_per_s, ",.0f")),
        ("kept", lambda s: f"{s.keep_mean:.3f}"),
        ("fidelity", lambda s: _number(s.fidelity_mean, ".3f")),
        ("peak GiB", lambda s: f"{s.peak_gib:.2f}"),
    )
    head = "".join(f'<th scope="col">{name}</th>' for name, _ in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell(step)}</td>" for _, cell in columns) + "</tr>" for step in steps[::stride]
    )
    thinned = f'<p class="small">One step in {stride}; all are in metrics.jsonl.</p>' if stride > 1 else ""
    return f'{thinned}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def html_table(heads: Sequence[str], lines: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A table of plain text; columns whose head is in `words` hold words, the others numbers."""
    kinds = [' class="words"' if head in words else "" for head in heads]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, line, strict=True)) + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table class="close"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def versions_table(versions: Mapping[str, str]) -> str:
    """Package versions."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(version)}</td></tr>" for name, version in versions.items())
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">package</th><th scope="col">version</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(part: Mapping[str, Any]) -> str:
        value = part.get(key)
        return f"{value:,}" if isinstance(value, int) else "-"

    return cell


def _tally(key: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(part: Mapping[str, Any]) -> str:
        value = part.get(key)
        if not isinstance(value, Mapping) or not value.get("documents"):
            return "0"
        return f"{value['documents']:,} ({value.get('tokens', 0):,} tokens)"

    return cell


def _lengths(part: Mapping[str, Any]) -> str:
    lengths = part.get("lengths")
    keys = ("min", "p50", "p90", "max")
    if not isinstance(lengths, Mapping) or any(key not in lengths for key in keys):
        return "-"
    return ", ".join(f"{lengths[key]:,}" for key in keys)


_DATA_ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("found", _count("found")),
    ("  empty", _count("empty")),
    ("  past max_documents", _count("not_taken")),
    ("  dropped, too short", _tally("dropped_short")),
    ("  dropped, too long", _tally("dropped_long")),
    ("used", _count("documents")),
    ("  truncated (tokens cut off)", _tally("truncated")),
    ("  split", _tally("split")),
    ("sequences", _count("sequences")),
    ("  packed into rows", _count("packed_rows")),
    ("tokens", _count("tokens")),
    ("labelled tokens", _count("labelled_tokens")),
    ("  labels lost by cutting (tokens)", _count("labels_lost")),
    ("sequence length: min, median, 90%, max (tokens)", _lengths),
)
