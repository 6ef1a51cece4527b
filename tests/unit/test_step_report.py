"""The report of step records: speed-up and memory against the strong baseline, extrapolation, damaged records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from html_page import Page
from lemo.bench import records
from lemo.bench.records import Record
from lemo.errors import UserError
from lemo.report import build_records
from lemo.report.step import groups, step_markdown


def row(method: str, T: int, layers: int, step_ms: float | None, peak: float | None = None, **more: Any) -> Record:
    details = {"layers": layers, "full_depth": 10, "weights_gib": 1.0, "out_of_memory": step_ms is None}
    details |= {"tflop": 0.02, "ceiling_tflop_per_s": 1.0}
    values: dict[str, Any] = {"setting": "default", "keep": 1.0, "gpu": "a GPU", "commit": "abc", **more}
    record = Record(bench="step", method=method, shape="tiny", T=T, step_ms=step_ms, peak_gib=peak, **values)
    record.details = details
    return record


ROWS = [
    row("lora+ckpt", 64, 2, 30.0, 3.0),
    row("lora+ckpt", 64, 4, 50.0, 4.0),
    row("lora+ckpt", 128, 4, 90.0, 5.0),
    row("lemo-backward", 64, 2, 20.0, 2.0, setting="spread 0.25", keep=0.25),
    row("lemo-backward", 64, 4, 30.0, 2.5, setting="spread 0.25", keep=0.25),
    row("lemo-backward", 128, 4, 45.0, 3.0, setting="spread 0.25", keep=0.25),
    row("lora", 64, 4, None),
]


def test_speed_up_memory_and_extrapolation() -> None:
    two, four, full = groups(ROWS)
    assert (two.layers, four.layers, full.layers) == (2, 4, 10)
    lemo = next(line for line in four.lines if line.name == "lemo-backward, spread 0.25" and line.T == 64)
    assert four.speed_up(lemo) == pytest.approx(50 / 30)
    assert four.memory_ratio(lemo) == pytest.approx(1.5 / 3.0)
    # ten layers: 50 + 6 * 10, and 30 + 6 * 5
    assert {(line.name, line.T): line.step_ms for line in full.lines} == {
        ("lora+ckpt", 64): pytest.approx(110.0),
        ("lemo-backward, spread 0.25", 64): pytest.approx(60.0),
    }
    assert "extrapolated from 2 and 4" in full.title
    baseline = full.baseline(64)
    assert baseline is not None
    assert (baseline.peak_gib, baseline.weights_gib) == (pytest.approx(7.0), pytest.approx(1.0))
    assert full.speed_up(baseline, over="lemo-backward, spread 0.25") == pytest.approx(60 / 110)
    assert full.operations_ratio(baseline) == 1.0


def test_markdown_says_what_did_not_fit() -> None:
    text = step_markdown(ROWS)
    assert "| 64 | `lora` | 1.000 | out of memory | n/a |" in text
    assert "| 64 | `lemo-backward, spread 0.25` | 0.250 | 30 | ×1.67 | 2,133 | 2.50 | 1.50 | ×0.50 | 67% |" in text


def test_page(tmp_path: Path) -> None:
    records.write(ROWS, tmp_path / "records.jsonl")
    text = build_records(tmp_path).read_text(encoding="utf-8")
    assert all(target.startswith("#") for target in Page(text).loads)
    assert "tiny, all 10 layers, extrapolated from 2 and 4, on a GPU" in text
    assert text.count("<svg") == 1  # only four layers were measured at two lengths


def test_parts_stand_in_a_steps_order_beside_their_floor(tmp_path: Path) -> None:
    one = row("lemo-backward", 64, 4, 20.0, 2.0)
    assert one.details is not None
    one.details["parts_ms"] = {
        "backward linears": 6.0,
        "forward linears": 8.0,
        "rest other": 1.0,
        "selection other": 1.0,
    }
    one.details["parts_tflop"] = {"backward linears": 0.004, "forward linears": 0.006}
    text = step_markdown([one])
    order = ["forward linears | 8.0 | 40.0% | 6.0", "selection other | 1.0 | 5.0% | n/a"]
    order += ["backward linears | 6.0 | 30.0% | 4.0", "rest other | 1.0 | 5.0%", "in no part | 4.0 | 20.0%"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    records.write([one], tmp_path / "records.jsonl")
    assert "Where a step of lemo-backward goes" in build_records(tmp_path).read_text(encoding="utf-8")


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    bad = row("lora", 64, 4, 1.0)
    bad.details = {"layers": 4}
    records.write([bad], tmp_path / "records.jsonl")
    with pytest.raises(UserError, match="no usable details"):
        build_records(tmp_path)
    with pytest.raises(UserError, match="two step records are lora"):
        groups([row("lora", 64, 4, 1.0), row("lora", 64, 4, 2.0)])


def test_without_the_strong_baseline_plain_lora_is_one_and_counts_are_shown(tmp_path: Path) -> None:
    rows = [row("lora", 64, 10, 40.0, 5.0), row("lemo-forward", 64, 10, 20.0, 3.0, setting="keep 0.5", keep=0.5)]
    for one, stored in zip(rows, (3.5, 1.25), strict=True):
        assert one.details is not None
        one.details |= {"stored_gib": stored, "moved_gb": 12.0}
    (group,) = groups(rows)
    assert group.baseline_name == "lora"
    assert group.speed_up(group.lines[1]) == pytest.approx(2.0)
    assert group.memory_ratio(group.lines[1]) == pytest.approx(0.5)
    records.write(rows, tmp_path / "records.jsonl")
    page = build_records(tmp_path).read_text()
    assert "By count, beside the measurement" in page
    assert "1.25" in page
    records.write(ROWS, tmp_path / "records.jsonl")
    assert "By count" not in build_records(tmp_path).read_text()
