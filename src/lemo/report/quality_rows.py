"""Records of quality studies, put in order: a study is one task on one device, a row one method with one setting."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lemo.bench.config import BASELINE
from lemo.bench.records import Record
from lemo.errors import UserError
from lemo.report.records import Bucket

# The order of rows, everywhere.
METHODS = (
    BASELINE,
    "lemo-backward",
    "lemo-backward+attend",
    "lemo-segments",
    "lemo-segments+attend",
    "lemo-attend",
    "lemo-forward",
    "random-blocks",
    "labels-only",
    "truncated",
    "stopped",
    "longlora",
)
TASKS = ("sft", "lm", "retrieval", "extension")
AGAIN = "give records that `lemo bench quality` wrote"
_CHECK = TypeAdapter(Record)


class DepthCell(BaseModel):
    """Share of retrieval answers that are right, for texts of one length and facts at depths [start, end) of them."""

    model_config = ConfigDict(frozen=True)

    length: int
    depth_start: float
    depth_end: float
    answers: int = 0
    before: float | None
    after: float | None
    sparse: float | None = None


class Details(BaseModel):
    """What a record of bench `quality` has in `details`."""

    model_config = ConfigDict(frozen=True)

    by_position: list[Bucket] = []
    by_depth: list[DepthCell] = []


@dataclass(frozen=True)
class Stat:
    """Mean and range over the runs that have a value: `count` of `runs`."""

    mean: float
    low: float
    high: float
    count: int
    runs: int


@dataclass(frozen=True)
class Row:
    """One method with one setting: its runs, by seed.

    Attributes:
        number: of the row in its study, from 1.
        speed_up: the baseline's time of a step / this one's; None if either wasn't timed.
        memory_ratio: peak memory / the baseline's.
    """

    number: int
    method: str
    setting: str
    runs: tuple[Record, ...]
    speed_up: float | None
    memory_ratio: float | None

    @property
    def is_baseline(self) -> bool:
        return (self.method, self.setting) == (BASELINE, "default")

    @property
    def name(self) -> str:
        return self.method if self.setting == "default" else f"{self.method}, {self.setting}"

    @property
    def harmful(self) -> bool:
        """Whether the dense model is worse than before training, in the mean over runs."""
        pairs = [(run.loss_before, run.loss_after) for run in self.runs]
        return sum(after - before for before, after in pairs if before is not None and after is not None) > 0

    def stat(self, key: str) -> Stat | None:
        """Mean and range of a record's key; None if no run has it."""
        return _stat([getattr(run, key) for run in self.runs])

    @cached_property
    def positions(self) -> list[Bucket]:
        """Held-out loss by position, means over the runs, of the buckets with labels."""
        groups: dict[tuple[int, int], list[Bucket]] = {}
        for details in self._details:
            for bucket in details.by_position:
                if bucket.before is not None and bucket.after is not None:
                    groups.setdefault((bucket.start, bucket.end), []).append(bucket)
        return [
            Bucket(
                start=start,
                end=end,
                tokens=sum(one.tokens for one in group),
                before=_mean(one.before for one in group),
                after=_mean(one.after for one in group),
            )
            for (start, end), group in sorted(groups.items())
        ]

    def depths(self, key: str) -> dict[tuple[int, float, float], float]:
        """Mean over the runs of a `DepthCell`'s `before`, `after` or `sparse`, by (length, depth_start, depth_end)."""
        groups: dict[tuple[int, float, float], list[float]] = {}
        for details in self._details:
            for cell in details.by_depth:
                if (value := getattr(cell, key)) is not None:
                    groups.setdefault((cell.length, cell.depth_start, cell.depth_end), []).append(value)
        return {where: statistics.fmean(values) for where, values in sorted(groups.items())}

    @cached_property
    def _details(self) -> list[Details]:
        return [Details.model_validate(run.details) for run in self.runs if run.details is not None]


@dataclass(frozen=True)
class Study:
    """One task, model, device, length and number of steps, with its rows in the order of `METHODS`."""

    task: str
    model: str
    gpu: str
    T: int
    batch: int
    steps: int
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row | None:
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def runs(self) -> list[Record]:
        return [run for row in self.rows for run in row.runs]

    def has(self, key: str) -> bool:
        """Whether any run has a value of the key."""
        return any(getattr(run, key) is not None for run in self.runs)


def check(record: Record) -> None:
    """Refuses a record of bench `quality` that no report can be made of.

    Raises:
        UserError: saying what is wrong with which row.
    """
    name = f"{record.method} {record.setting}, seed {record.seed}"
    missing = [key for key in ("task", "T", "batch", "steps", "setting", "seed") if getattr(record, key) is None]
    if record.model is None and record.shape is None:
        missing.append("model")
    if missing:
        raise UserError(f"the row of {name} lacks {', '.join(missing)}; {AGAIN}")
    try:
        _CHECK.validate_json(json.dumps(asdict(record)), strict=True)
        Details.model_validate(record.details or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"the row of {name}: {where}: {first['msg']}; {AGAIN}") from error


def studies(records: Iterable[Record]) -> list[Study]:
    """Rows of bench `quality`, grouped; others are left out. Tasks in the order of `TASKS`.

    Raises:
        UserError: a row that lacks what it must have, or two of one method, setting and seed in one study.
    """
    groups: dict[tuple[str, str, str, int, int, int], list[Record]] = {}
    for r in records:
        if r.bench == "quality":
            check(r)
            key = (r.task or "", r.model or r.shape or "", r.gpu, r.T or 0, r.batch or 0, r.steps or 0)
            groups.setdefault(key, []).append(r)
    ordered = sorted(groups.items(), key=lambda item: (_rank(item[0][0], TASKS), item[0]))
    return [Study(*key, _rows(runs)) for key, runs in ordered]


def _rows(runs: Sequence[Record]) -> tuple[Row, ...]:
    counts = Counter((run.method, run.setting, run.seed) for run in runs)
    (method, setting, seed), most = counts.most_common(1)[0]
    if most > 1:
        raise UserError(
            f"{most} rows of {method} with setting {setting!r} and seed {seed} for the same task, model and device; "
            "give the records of one study"
        )
    groups: dict[tuple[str, str], list[Record]] = {}
    for run in sorted(runs, key=lambda run: (row_order(run.method, run.setting or ""), run.seed)):
        groups.setdefault((run.method, run.setting or ""), []).append(run)
    baseline = groups.get((BASELINE, "default"), [])
    rows = []
    for number, ((method, setting), own) in enumerate(groups.items(), start=1):
        ms, base_ms = median_step_ms(own), median_step_ms(baseline)
        gib, base_gib = peak_gib(own), peak_gib(baseline)
        speed_up = base_ms / ms if ms and base_ms else None
        rows.append(Row(number, method, setting, tuple(own), speed_up, gib / base_gib if gib and base_gib else None))
    return tuple(rows)


def median_step_ms(runs: Sequence[Record]) -> float | None:
    """Median over runs of the median time of a step; None if none was timed."""
    known = [run.step_ms for run in runs if run.step_ms is not None]
    return statistics.median(known) if known else None


def peak_gib(runs: Sequence[Record]) -> float | None:
    """The highest peak of the runs."""
    return max((run.peak_gib for run in runs if run.peak_gib is not None), default=None)


def row_order(method: str, setting: str) -> tuple[object, ...]:
    """Key to sort rows by: `METHODS`; then `default` before other settings, whose numbers go by size."""
    parts = re.findall(r"\d+(?:\.\d+)?|[^\d]+", setting)
    numbers_by_size = [(float(part), "") if part[0].isdigit() else (-1.0, part) for part in parts]
    return _rank(method, METHODS), setting != "default", numbers_by_size


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name), "") if name in order else (len(order), name)


def _stat(values: Sequence[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    return Stat(statistics.fmean(known), min(known), max(known), len(known), len(values)) if known else None


def _mean(values: Iterable[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)
