"""Committed records are whole, and the README's table is the one they give."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, Record, read, write  # noqa: E402
from benchmarks.table import README, demo_table, replaced  # noqa: E402

RECORDS = sorted(RESULTS.glob("*/*.jsonl"))


def test_there_are_records():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_every_row_has_every_key_and_says_where_it_comes_from(path):
    for row in read(path):
        assert list(row) == [field.name for field in fields(Record)]
        assert all(row[key] for key in ("bench", "method", "gpu", "versions", "commit", "command", "time"))


def test_the_readme_shows_what_the_records_say():
    text = README.read_text()
    assert replaced(text, demo_table()) == text, "run: python -m benchmarks.table"


def test_the_table_follows_the_records(tmp_path):
    def row(method, loss_after, gain):
        return Record(
            bench="step",
            method=method,
            T=64,
            steps=2,
            keep=0.5,
            fidelity=0.98,
            step_ms=10.0,
            step_ms_min=9.0,
            step_ms_max=12.0,
            peak_gib=1.0,
            loss_before=2.0,
            loss_after=loss_after,
            gain_retained=gain,
            gpu="g",
        )

    write([row("a", 1.5, 1.0), row("b", 1.6, 0.8), row("b", 1.5, 1.0)], tmp_path / "g" / "d_demo.jsonl")
    lines = demo_table(tmp_path).splitlines()
    assert len(lines) == 4
    assert "| `b` | 2 |" in lines[3]
    assert lines[3].endswith("2.000 → 1.550 | 90% (80% to 100%) |")
