"""The rows of a quality study: from what runs measured to records, on disk after every change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lemo.bench import records
from lemo.bench.config import BASELINE, MethodConfig, QualityConfig
from lemo.bench.records import Record
from lemo.bench.runs import Judgement, StepTime, Trained
from lemo.evaluation import accuracy, by_depth, compare_positions
from lemo.training.summary import versions

# More steps than this times the baseline's are not run, however fast a method is.
_MOST_STEPS = 4


@dataclass(frozen=True)
class Job:
    """One training run; `equal_time` says which columns of the row it fills."""

    method: MethodConfig
    seed: int
    steps: int
    equal_time: bool = False

    def label(self) -> str:
        what = f"{self.steps} steps" + (" (equal time)" if self.equal_time else "")
        return f"{self.method.method} {self.method.setting}, seed {self.seed}, {what}"


class Book:
    """The rows of a study, on disk after every change.

    Args:
        study: the study.
        rows: those from earlier.
        path: where they are written.
    """

    def __init__(self, study: QualityConfig, rows: list[Record], path: Path) -> None:
        self.study = study
        self.rows = rows
        self.path = path

    def time_of(self, method: MethodConfig) -> float | None:
        """Milliseconds of a step on this device, None if not timed."""
        row = self._time_row(method)
        return row.step_ms if row else None

    def steps_in_equal_time(self, method: MethodConfig) -> int:
        """Steps that fit in the baseline's time, at most four times its steps."""
        own, baseline = self.time_of(method), self.time_of(MethodConfig(method=BASELINE))
        assert own is not None, "QualityConfig asks for the timing"
        assert baseline is not None, "the baseline is timed first"
        steps = self.study.training.steps
        return max(1, min(round(steps * baseline / own), _MOST_STEPS * steps))

    def add_time(self, method: MethodConfig, measured: StepTime) -> None:
        """A row of bench `step`."""
        row = self._row("step", method, seed=0, steps=self.study.timed_steps)
        row.step_ms, row.step_ms_min, row.step_ms_max = measured.median_ms, measured.min_ms, measured.max_ms
        row.tokens_per_s, row.concurrent = measured.tokens_per_s, 1
        self.rows.append(row)
        self._write()

    def holds(self, job: Job) -> bool:
        """Whether the run has been made."""
        row = self._quality_row(job.method, job.seed)
        return row is not None and (row.loss_after_equal_time if job.equal_time else row.loss_after) is not None

    def add_run(self, job: Job, before: Judgement, trained: Trained) -> None:
        """A run's results, in a new row or in the other horizon's."""
        row = self._quality_row(job.method, job.seed)
        if row is None:
            row = self._row("quality", job.method, job.seed, self.study.training.steps)
            self.rows.append(row)
        # A row's runs may be days and machines apart: its gain stays what the first of them gave.
        if row.loss_before is None or not job.equal_time:
            row.loss_before = before.loss
        if job.equal_time:
            row.steps_equal_time, row.loss_after_equal_time = job.steps, trained.after.loss
        else:
            self._fill(row, before, trained)
        self._copy_times()
        self._gains()
        self._write()

    def _fill(self, row: Record, before: Judgement, trained: Trained) -> None:
        after, sparse = trained.after, trained.after_sparse
        row.keep, row.fidelity, row.density = trained.keep, trained.fidelity, trained.density
        row.peak_gib, row.peak_reserved_gib = trained.peak_gib, trained.peak_reserved_gib
        row.wall_s, row.concurrent = sum(trained.step_s), self.study.workers
        row.loss_after = after.loss
        row.loss_after_sparse = sparse.loss if sparse else None
        row.details = {"by_position": compare_positions(before.by_position, after.by_position)}
        if after.answers:
            row.accuracy_before, row.accuracy_after = accuracy(before.answers), accuracy(after.answers)
            row.accuracy_after_sparse = accuracy(sparse.answers) if sparse else None
            row.details["by_depth"] = _by_depth(before, after, sparse, self.study.task.depths)

    def _copy_times(self) -> None:
        for row in self.rows:
            timed = next((time for time in self.rows if _times(time, row)), None)
            if row.bench == "quality" and timed is not None:
                row.step_ms, row.step_ms_min, row.step_ms_max = timed.step_ms, timed.step_ms_min, timed.step_ms_max
                row.tokens_per_s = timed.tokens_per_s

    def _gains(self) -> None:
        """Gain retained of every row whose baseline is there."""
        baseline = {
            row.seed: row.loss_before - row.loss_after
            for row in self.rows
            if row.bench == "quality" and (row.method, row.setting) == (BASELINE, "default")
            if row.loss_before is not None and row.loss_after is not None
        }
        for row in self.rows:
            whole = baseline.get(row.seed)
            if row.bench == "quality" and whole and row.loss_before is not None:
                if row.loss_after is not None:
                    row.gain_retained = (row.loss_before - row.loss_after) / whole
                if row.loss_after_equal_time is not None:
                    row.gain_retained_equal_time = (row.loss_before - row.loss_after_equal_time) / whole

    def _row(self, bench: str, method: MethodConfig, seed: int, steps: int) -> Record:
        study = self.study
        row = Record(
            bench=bench,
            method=method.method,
            model=study.model.name,
            task=study.task.kind,
            T=study.task.max_tokens,
            batch=study.training.batch_size * study.training.accumulation,
            setting=method.setting,
            seed=seed,
            steps=steps,
            versions=versions(),
        )
        row.commit = study.commit or row.commit
        return row

    def _time_row(self, method: MethodConfig) -> Record | None:
        here = records.device_name()
        wanted = ("step", method.method, method.setting, here)
        return next((r for r in self.rows if (r.bench, r.method, r.setting, r.gpu) == wanted), None)

    def _quality_row(self, method: MethodConfig, seed: int) -> Record | None:
        wanted = ("quality", method.method, method.setting, seed)
        return next((r for r in self.rows if (r.bench, r.method, r.setting, r.seed) == wanted), None)

    def _write(self) -> None:
        records.write(self.rows, self.path)


def _times(time: Record, row: Record) -> bool:
    return time.bench == "step" and (time.method, time.setting, time.gpu) == (row.method, row.setting, row.gpu)


def _by_depth(before: Judgement, after: Judgement, sparse: Judgement | None, depths: int) -> list[dict[str, object]]:
    cells = []
    sparse_cells = by_depth(sparse.answers, depths) if sparse else None
    for index, (old, new) in enumerate(
        zip(by_depth(before.answers, depths), by_depth(after.answers, depths), strict=True)
    ):
        cell = {key: value for key, value in old.items() if key != "accuracy"}
        cell |= {"before": old["accuracy"], "after": new["accuracy"]}
        if sparse_cells is not None:
            cell["sparse"] = sparse_cells[index]["accuracy"]
        cells.append(cell)
    return cells
