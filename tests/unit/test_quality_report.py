"""The report of a quality study: every number of the records, nothing loaded, and refused for foreign files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from html_page import Page
from lemo.bench.config import MethodConfig, TaskConfig
from lemo.bench.records import Record, write
from lemo.errors import UserError
from lemo.report import build_records, holds_records, quality_figures
from lemo.report.quality import ABOUT, quality_markdown
from lemo.report.quality_figures import Box, _place
from lemo.report.quality_rows import METHODS, TASKS, Row, studies
from synthetic_quality import RETRIEVAL, SFT, row, study, write_study
from synthetic_run import write_run

FRONTIER = "Gain retained against speed and memory"
DEPTHS = "Accuracy by depth and length"
POSITIONS = "What training won of the held-out loss, by position"


def page_of(directory: Path, records: list[Record]) -> Page:
    path = build_records(write_study(directory, records))
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_methods_and_tasks_are_those_that_can_be_run() -> None:
    assert set(METHODS) == set(get_args(MethodConfig.model_fields["method"].annotation))
    assert set(TASKS) == set(ABOUT) == set(get_args(TaskConfig.model_fields["kind"].annotation))
    assert set(quality_figures._LOOKS) == set(METHODS)
    assert len(set(quality_figures._LOOKS.values())) == len(METHODS)
    assert len({marker for _, marker in quality_figures._LOOKS.values()}) == len(METHODS)


def test_a_study_shows_its_numbers_and_figures(tmp_path: Path) -> None:
    page = page_of(tmp_path / "s", study())
    for shown in (
        "smollm2-135m-instruct · NVIDIA H100 80GB HBM3 · T = 8,192, 100 steps with a batch of 1",
        "seeds 0, 1, 2, 3, 4 · commit abc1234",
        # seeds, keep, fidelity, gain, equal time, step, peak, loss
        "2 lemo-backward default 5 0.26 0.983 98% (96% to 101%) 103% (101% to 106%) 420 (×1.29) 0.91 (×0.95) 1.700 →",
        "11 lemo-forward keep 0.5 1 0.50 n/a −522%, harmful n/a 260 (×2.08) 0.55 (×0.57) 1.700 → 2.222 2.400",
        "Harmful: the dense model is worse than before training.",
        "11: −522%",
        "1 row of another bench is not shown",
        "Cut off at the lower edge: lemo-forward, keep 0.25 (down to −0.953)",
        "lemo bench quality --config sft.yaml",
        "2.11.0",
    ):  # fmt: skip
        assert shown in page.text
    assert page.labels == [FRONTIER, POSITIONS]
    assert page.text.count("harmful") == 4, "three rows, and what gain retained means"


def test_every_run_is_listed(tmp_path: Path) -> None:
    records = study()
    build_records(write_study(tmp_path / "s", records))
    text = (tmp_path / "s" / "report.html").read_text()
    runs = text[text.index("Every run, seed by seed") : text.index("Versions and command")]
    assert runs.count("<tr>") == 1 + sum(record.bench == "quality" for record in records)


def test_retrieval_shows_accuracy_by_depth_and_length(tmp_path: Path) -> None:
    page = page_of(tmp_path / "s", study("retrieval", RETRIEVAL))
    assert page.labels == [FRONTIER, DEPTHS, POSITIONS]
    assert "0.120 → 0.882 n/a" in page.text
    assert "2.400 0.120 → 0.000 0.050" in page.text, "sparse loss, accuracy, sparse accuracy"
    for shown in ("before training", "3: lemo-forward", "keep 0.5, judged sparse", "83–100%", "8K"):
        assert shown in page.text


def test_several_files_are_sections_of_one_page_that_loads_nothing(tmp_path: Path) -> None:
    write(study(), tmp_path / "a.jsonl")
    write(study("retrieval", RETRIEVAL), tmp_path / "b.jsonl")
    text = build_records(tmp_path).read_text()
    page = Page(text)
    assert page.labels == [FRONTIER, POSITIONS, FRONTIER, DEPTHS, POSITIONS]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.loads if target.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    # No placeholder colour is left, and every colour that is named is defined in both themes.
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", text)
    for name in set(re.findall(r"var\(--(\w+)\)", text)) - {"sans", "mono"}:
        assert text.count(f"--{name}:") == 2, name


def test_the_same_records_give_the_same_page_in_any_order(tmp_path: Path) -> None:
    records = study()
    first = build_records(write_study(tmp_path / "a", records)).read_bytes()
    again = build_records(write_study(tmp_path / "b", records[::-1])).read_bytes()
    assert first == again


def test_where_the_report_goes(tmp_path: Path) -> None:
    write(study("lm", SFT[:2]), tmp_path / "x_quality-lm.jsonl")
    assert build_records(tmp_path / "x_quality-lm.jsonl") == tmp_path / "x_quality-lm.html"
    assert build_records(tmp_path, tmp_path / "other.html") == tmp_path / "other.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "other.html", "x_quality-lm.html", "x_quality-lm.jsonl",
    ]  # fmt: skip


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    records = study("lm", SFT[:3], timed=False)
    for record in records:
        record.details = None
    page = page_of(tmp_path / "untimed", records)
    assert page.labels == [FRONTIER]
    assert "Steps weren't timed." in page.text
    assert "fewer than two position buckets" in page.text
    alone = [record for record in study() if record.method != "lora+ckpt"]
    for record in alone:
        record.gain_retained = record.gain_retained_equal_time = None
    page = page_of(tmp_path / "no-baseline", alone)
    assert "lora+ckpt is not there yet," in page.text
    assert "×1" not in page.text
    assert page.labels == [POSITIONS]


def test_a_run_without_a_result_is_counted() -> None:
    records = study("lm", SFT[:2])
    # A row that only the run of equal time has filled so far.
    for record in records[5:7]:
        record.loss_after = record.gain_retained = record.keep = record.peak_gib = None
    (one,) = studies(records)
    gain = one.rows[1].stat("gain_retained")
    assert gain is not None
    assert (gain.count, gain.runs) == (3, 5)
    assert ", 3 of 5 runs |" in quality_markdown(records, "lm")


def test_rows_are_ordered_and_compared_with_the_baseline() -> None:
    (one,) = studies(study(rows=SFT[::-1]))
    assert [(r.method, r.setting) for r in one.rows] == [(r[0], r[1]) for r in SFT]
    assert [r.number for r in one.rows] == list(range(1, len(SFT) + 1))
    assert one.rows[1].speed_up == pytest.approx(540 / 420)
    assert one.rows[1].memory_ratio == pytest.approx(0.91 / 0.96)
    assert [r.name for r in one.rows if r.harmful] == [f"lemo-forward, keep {keep}" for keep in (0.25, 0.5, 0.75)]


def test_details_are_means_over_seeds() -> None:
    def bucket(start: int, after: float | None) -> dict[str, object]:
        return {"start": start, "end": start + 8, "tokens": 4, "before": after and 2.0, "after": after}

    def cell(after: float) -> dict[str, object]:
        return {"length": 64, "depth_start": 0.0, "depth_end": 0.5, "answers": 3, "before": 0.0, "after": after}

    runs = tuple(
        row("lora+ckpt", "default", seed, details={"by_position": buckets, "by_depth": [cell(share)]})
        for seed, buckets, share in ((0, [bucket(0, 1.0), bucket(8, None)], 0.5), (1, [bucket(0, 1.5)], 1.0))
    )
    means = Row(1, "lora+ckpt", "default", runs, None, None)
    assert [(b.start, b.before, b.after) for b in means.positions] == [(0, 2.0, 1.25)]
    assert means.depths("after") == {(64, 0.0, 0.5): 0.75}
    assert means.depths("sparse") == {}


def test_markdown_of_a_task() -> None:
    lines = quality_markdown([*study(), *study("retrieval", RETRIEVAL)], "retrieval").splitlines()
    assert lines[0] == ("`smollm2-135m-instruct`, T = 8,192, 100 steps with a batch of 1, on NVIDIA H100 80GB HBM3.")
    assert len(lines) == 4 + len(RETRIEVAL)
    assert lines[5] == (
        "| 2 | `lemo-backward` | default | 5 | 0.26 | 98% (96% to 101%) | 103% (101% to 106%) | 420 (×1.29) "
        "| 0.91 (×0.95) | 0.120 → 0.882 | 1.700 → 1.602 | n/a |"
    )
    assert [line for line in lines if line.endswith("| 2.400 |")], "judged sparse"
    assert {line.count("|") for line in lines[2:]} == {13}
    assert "accuracy" not in quality_markdown(study(), "sft")
    assert quality_markdown(study(), "lm") == ""
    assert quality_markdown([*study(gpu="one"), *study(gpu="two")], "sft").count("on one.\n\n| # | method") == 1
    piped = [replace(record, setting="a|b") for record in study("lm", SFT[1:2]) if record.bench == "quality"]
    assert "| a\\|b |" in quality_markdown(piped, "lm")


def test_labels_find_free_places_or_the_least_crowded() -> None:
    frame = Box(0, 0, 200, 200)
    marker = Box(96, 96, 104, 104)
    *_, first = _place(100, 100, 10, 9, [marker], frame)
    *_, second = _place(100, 100, 10, 9, [marker, first], frame)
    assert first.overlap(marker) == second.overlap(marker) == second.overlap(first) == 0
    *_, corner = _place(199, 199, 10, 9, [], frame)
    assert corner.overlap(frame) == pytest.approx(90)
    *_, hopeless = _place(100, 100, 10, 9, [frame], frame)
    assert hopeless.overlap(frame) == pytest.approx(90)


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    records = [
        replace(record, setting=evil, gpu=evil, model=evil, commit=evil, command=evil, task=evil, versions={evil: evil})
        for record in study(rows=SFT[:1])
        if record.bench == "quality"
    ]
    build_records(write_study(tmp_path / "s", records))
    assert "<script" not in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": None}, "lora.ckpt None, seed 0 lacks setting"),
        ({"model": None, "steps": None}, "seed 0 lacks steps, model"),
        ({"step_ms": "fast"}, "seed 0: step_ms: Input should be a valid number"),
        ({"details": {"by_position": [{"start": 0}]}}, r"seed 0: by_position\.0\.end: Field required"),
        ({"seed": 1}, "2 rows of lora.ckpt with setting 'default' and seed 1"),
    ],
)
def test_damage_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    records = [row("lora+ckpt", "default", seed) for seed in (0, 1)]
    for key, value in changes.items():
        setattr(records[0], key, value)
    with pytest.raises(UserError, match=message + ".*; give"):
        build_records(write_study(tmp_path / "s", records))
    assert not (tmp_path / "s" / "report.html").exists()


def test_foreign_and_empty_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or directory; give records that `lemo bench quality` wrote"):
        build_records(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        build_records(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no record of a quality study"):
        build_records(tmp_path / "empty.jsonl")
    write([Record("step", "lora+ckpt")], tmp_path / "step.jsonl")
    with pytest.raises(UserError, match="no record of a quality study"):
        build_records(tmp_path / "step.jsonl")
    run = write_run(tmp_path / "run", steps=2, layers=2)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a benchmark record"):
        build_records(run)


def test_runs_and_records_are_told_apart(tmp_path: Path) -> None:
    write_study(tmp_path / "study", study("lm", SFT[:1]))
    assert holds_records(tmp_path / "study")
    assert holds_records(tmp_path / "study" / "records.jsonl")
    assert not holds_records(write_run(tmp_path / "run", steps=2, layers=2))
    assert not holds_records(tmp_path / "absent")
