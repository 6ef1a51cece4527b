"""A study's rows when it is resumed elsewhere, where the untrained model's loss is a little different."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemo.bench.book import Book, Job
from lemo.bench.config import BASELINE, MethodConfig, QualityConfig, TaskConfig
from lemo.bench.runs import Judgement, Trained


def judged(loss: float) -> Judgement:
    return Judgement(loss, (), ())


def trained(loss: float) -> Trained:
    return Trained(judged(loss), None, 0.5, None, None, 1.0, None, (0.1,))


def test_a_later_run_at_equal_time_leaves_the_rows_gain_alone(tmp_path: Path) -> None:
    ours = MethodConfig(method="truncated", setting="half", keep=0.5)
    book = Book(QualityConfig(task=TaskConfig(kind="sft"), methods=(ours,)), [], tmp_path / "records.jsonl")
    book.add_run(Job(MethodConfig(method=BASELINE), 0, 10), judged(2.0), trained(1.0))
    book.add_run(Job(ours, 0, 10), judged(2.0), trained(1.2))
    book.add_run(Job(ours, 0, 20, equal_time=True), judged(2.1), trained(1.1))
    row = book.rows[-1]
    assert (row.loss_before, row.steps_equal_time) == (2.0, 20)
    assert row.gain_retained == pytest.approx(0.8)
    assert row.gain_retained_equal_time == pytest.approx(0.9)
