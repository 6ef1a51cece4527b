"""Records of single operations as one self-contained HTML page, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lemo.bench.records import Record
from lemo.errors import UserError
from lemo.report.page import document
from lemo.report.tables import html_table, versions_table

# What the others are compared with.
_PLAIN = ("naive", "logits")
_HEADS = (
    "operation",
    "T",
    "keep",
    "by",
    "ms (min to max)",
    "speed-up",
    "by bytes",
    "of floor",
    "beyond in- and outputs, GiB",
)
_WORDS = ("operation", "by")
# Shares of the blocks kept that the compact table shows, in this order.
_KEEPS = (0.5, 0.25)
_BETWEEN = " · "
_OUT = "out of memory"
_COMPACT_HEADS = (
    "operation",
    "T",
    "ms",
    "speed-up",
    "by bytes",
    "of floor",
    "GiB beyond in- and outputs",
    "the plain way's",
)


class Details(BaseModel):
    """What an operation's record says beside the keys that all records have."""

    model_config = ConfigDict(extra="allow")

    op: str
    implementation: str
    gigabytes: float
    tflop: float
    floor_ms: float | None
    copy_gb_per_s: float | None
    ceiling_tflop_per_s: float | None
    above_gib: float | None


@dataclass(frozen=True)
class OpLine:
    """One implementation of one operation at one size.

    Attributes:
        speed_up: the plain way's time / this one's; None without either.
        by_bytes: the plain way's least bytes / this one's: the speed-up at equal bandwidth.
        of_floor: what the bytes or operations at least take / the time.
    """

    row: Record
    details: Details
    plain: tuple[Record, Details] | None

    @property
    def speed_up(self) -> float | None:
        theirs = self.plain[0].step_ms if self.plain else None
        return theirs / self.row.step_ms if theirs and self.row.step_ms else None

    @property
    def by_bytes(self) -> float | None:
        theirs = self.plain[1].gigabytes if self.plain else None
        return theirs / self.details.gigabytes if theirs and self.details.gigabytes else None

    @property
    def of_floor(self) -> float | None:
        floor = self.details.floor_ms
        return floor / self.row.step_ms if floor and self.row.step_ms else None


def op_lines(records: Iterable[Record]) -> list[OpLine]:
    """The operations of `lemo bench ops` among some records, in their order.

    Raises:
        UserError: a damaged record.
    """
    found = [(row, _details(row)) for row in records if row.bench == "op" and "op" in (row.details or {})]
    plain = {_place(row, d): (row, d) for row, d in found if d.implementation in _PLAIN}
    return [OpLine(row, d, plain.get(_place(row, d))) for row, d in found]


def _place(row: Record, details: Details) -> tuple[Any, ...]:
    return details.op, row.shape, row.T, row.keep, row.gpu


def _details(record: Record) -> Details:
    try:
        return Details.model_validate(record.details)
    except ValidationError as error:
        raise UserError(
            f"an operation's record ({record.setting}) has no usable details ({error.error_count()} faults); measure "
            "it anew"
        ) from error


def render_ops(lines: Sequence[OpLine]) -> str:
    """The whole page."""
    body = [
        "<h1>Single operations</h1>",
        "<p>Median of calls one by one, with a cold cache on a GPU. Speed-up: over the naive way (index, zeros, "
        "scatter, add), or over all logits at once. By bytes: the same if every byte that must be moved cost the same. "
        "Of floor: what these bytes take at the bandwidth of a large copy, or the operations at the rate of a large "
        "matrix product, as a share of the time.</p>",
    ]
    for gpu in dict.fromkeys(line.row.gpu for line in lines):
        mine = [line for line in lines if line.row.gpu == gpu]
        best = mine[0].details
        if best.copy_gb_per_s and best.ceiling_tflop_per_s:
            rates = f"copies {best.copy_gb_per_s:,.0f} GB/s, multiplies {best.ceiling_tflop_per_s:,.0f} TFLOP/s"
        else:
            rates = "no floor is measured here"
        body.append(f"<h2>{escape(gpu)}</h2><p>{escape(rates)}</p>")
        body.append(html_table(_HEADS, [_cells(line) for line in mine], _WORDS))
    commits = ", ".join(dict.fromkeys(line.row.commit for line in lines))
    body += [
        "<h2>Versions</h2>",
        versions_table(lines[0].row.versions),
        f'<p class="small">Commit {escape(commits)}.</p>',
    ]
    return document("Single operations", "\n".join(body), wide=True)


def ops_markdown(lines: Sequence[OpLine]) -> str:
    """A GitHub table for each device, or nothing: a row an operation and length, whose cells go through `_KEEPS`.

    Of an operation that has kernels the twin has no row; the plain way is in the others' cells.
    """
    parts = []
    for gpu in dict.fromkeys(line.row.gpu for line in lines):
        mine = [line for line in lines if line.row.gpu == gpu and line.details.implementation not in _PLAIN]
        kernels = {line.details.op for line in mine if line.details.implementation == "kernels"}
        rows: dict[tuple[str, int], list[OpLine]] = {}
        for line in mine:
            op, by = line.details.op, line.details.implementation
            if line.row.keep in (None, *_KEEPS) and not (by == "twin" and op in kernels):
                words = "" if by in ("kernels", "lemo") else f", by {by}"
                rows.setdefault((f"{op}, {line.row.shape}{words}", line.row.T or 0), []).append(line)
        cells = (_compact(name, T, found) for (name, T), found in rows.items())
        table = [f"| {' | '.join(row)} |" for row in (_COMPACT_HEADS, *cells)]
        parts.append("\n".join([f"On {gpu}.\n", table[0], "|" + "---|" * len(_COMPACT_HEADS), *table[1:]]))
    return "\n\n".join(parts)


def _compact(name: str, T: int, lines: Sequence[OpLine]) -> list[str]:
    """A cell has the value at each of `_KEEPS`, or only one where nothing is left out."""
    found = {line.row.keep: line for line in lines}
    shown = [found[None]] if None in found else [found.get(keep) for keep in _KEEPS]

    def cell(value: Callable[[OpLine], str]) -> str:
        return _BETWEEN.join("n/a" if line is None else value(line) for line in shown)

    return [
        name,
        f"{T:,}",
        cell(lambda line: _number(line.row.step_ms, ",.3f")),
        cell(lambda line: _number(line.speed_up, ".2f", "×")),
        cell(lambda line: _number(line.by_bytes, ".2f", "×")),
        cell(lambda line: _number(line.of_floor, ".0%")),
        cell(lambda line: _number(line.details.above_gib, ".3f")),
        cell(_plain_gib),
    ]


def _plain_gib(line: OpLine) -> str:
    if line.plain is None:
        return "n/a"
    row, details = line.plain
    return _OUT if row.step_ms is None else _number(details.above_gib, ".3f")


def _cells(line: OpLine) -> list[str]:
    row, details = line.row, line.details
    if row.step_ms is None or row.step_ms_min is None or row.step_ms_max is None:
        time = _OUT
    else:
        time = f"{row.step_ms:,.3f} ({row.step_ms_min:,.3f} to {row.step_ms_max:,.3f})"
    return [
        f"{details.op}, {row.shape}",
        f"{row.T:,}",
        _number(row.keep, ".2f"),
        details.implementation,
        time,
        _number(line.speed_up, ".2f", "×"),
        _number(line.by_bytes, ".2f", "×"),
        _number(line.of_floor, ".0%"),
        _number(details.above_gib, ".3f"),
    ]


def _number(value: float | None, form: str, before: str = "") -> str:
    return "n/a" if value is None else before + format(value, form)
