"""Committed records are whole, and the tables and the figure of the pages are those they give."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from lemo.bench.records import KEYS, Record, read, write
from lemo.bench.step_config import LIGER
from lemo.report.quality_rows import studies
from lemo.report.step import Group
from lemo.report.step_line import Line
from synthetic_quality import RETRIEVAL, study
from synthetic_run import write_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.figure import draw_depths, draw_frontier, draw_speed  # noqa: E402
from benchmarks.paper import pairs, paper_table  # noqa: E402
from benchmarks.paper_figure import draw_paper  # noqa: E402
from benchmarks.record_demo import record_of  # noqa: E402
from benchmarks.speed import Depth, expected_table, full_depth, parts_tables, speed_table  # noqa: E402
from benchmarks.table import README, RESULTS, compact_table, demo_table, named, page, replaced, tables  # noqa: E402

BASELINE, OURS = "lora+ckpt", "lemo-backward, spread 0.25"
RECORDS = sorted(RESULTS.glob("*/*.jsonl"))


def test_there_are_records():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_every_row_has_every_key_and_says_where_it_comes_from(path):
    for line, row in zip(path.read_text().splitlines(), read(path), strict=True):
        assert tuple(json.loads(line)) == KEYS
        assert all((row.bench, row.method, row.gpu, row.versions, row.commit, row.command, row.time))


@pytest.mark.parametrize("path", tables(), ids=lambda path: path.name)
def test_the_pages_show_what_the_records_say(path):
    text = path.read_text() if path.is_file() else ""
    assert page(path, tables()[path]) == text, "run: python -m benchmarks.table"


def test_the_demo_table_follows_the_records(tmp_path):
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

    (tmp_path / "g").mkdir()
    write([row("a", 1.5, 1.0), row("b", 1.6, 0.8), row("b", 1.5, 1.0)], tmp_path / "g" / "d_demo.jsonl")
    lines = demo_table(tmp_path).splitlines()
    assert len(lines) == 4
    assert "| `b` | 2 |" in lines[3]
    assert lines[3].endswith("10 (9 to 12) | 1.00 | 2.000 → 1.550 | 90% (80% to 100%) |")


def test_a_run_of_the_demo_becomes_a_row(tmp_path):
    row = record_of(write_run(tmp_path / "run", steps=6))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (row.method, row.command, row.steps) == ("lemo-backward", "make demo", 6)
    assert (row.step_ms, row.tokens_per_s) == pytest.approx((22_700, row.T / 22.7))
    assert (row.keep, row.loss_after) == (summary["keep_mean"], summary["loss_after"])
    write([row], tmp_path / "rows.jsonl")
    assert read(tmp_path / "rows.jsonl") == [row]


def test_quality_records_fill_both_pages(tmp_path):
    (tmp_path / "g").mkdir()
    write(study(), tmp_path / "g" / "d_quality-sft.jsonl")
    parts = {path.name: part for path, part in tables(tmp_path).items()}
    assert "| `labels-only` |" in parts["README.md"]["quality"]
    assert "| `random-blocks` | keep 0.5 |" in parts["quality.md"]["quality:sft"]
    assert parts["quality.md"]["quality:lm"] == ""


def test_the_readmes_quality_table_has_its_rows_and_a_column_a_task():
    lines = compact_table(study() + study("retrieval", RETRIEVAL)).splitlines()
    assert lines[0].endswith("`smollm2-135m-instruct` on NVIDIA H100 80GB HBM3.")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[4:]}
    assert list(cells) == [
        "`lora+ckpt`", "`lemo-backward`", "`lemo-segments`, keep 0.25", "`lemo-segments`, keep 0.5",
        "`lemo-forward`, keep 0.5", "`labels-only`", "`truncated`, keep 0.25", "`truncated`, keep 0.5",
        "`stopped`, 0.75", "`longlora`",
    ]  # fmt: skip
    assert lines[2].count("|") == 5
    assert cells["`lora+ckpt`"] == ["100%, keep 1.00", "100%, keep 1.00", "0.120 → 0.900 |"]
    assert cells["`lemo-segments`, keep 0.5"][1:] == ["n/a", "n/a |"]
    assert cells["`lemo-forward`, keep 0.5"][0] == "−522%, harmful, keep 0.50"


def test_devices_stay_apart():
    table = compact_table([*study(gpu="one"), *study(gpu="two")])
    assert table.count("on one.") == table.count("on two.") == 1
    assert table.count("| `longlora` |") == 2


def test_a_table_needs_its_markers():
    assert replaced("a\n<!-- m -->\nold\n<!-- /m -->\nb", "m", "new") == "a\n<!-- m -->\nnew\n<!-- /m -->\nb"
    assert replaced("<!-- m -->\nold\n<!-- /m -->", "m", "") == "<!-- m -->\nNot measured yet.\n<!-- /m -->"
    assert replaced("no markers", "m", "") == "no markers"
    for text in ("no markers", "<!-- m -->\nno end", "no begin\n<!-- /m -->", "<!-- /m -->\n<!-- m -->"):
        with pytest.raises(ValueError, match="put <!-- m --> and <!-- /m -->"):
            replaced(text, "m", "new")
    with pytest.raises(ValueError, match=r"README\.md: put <!-- no-such -->"):
        page(README, {"no-such": "table"})


def steps_at_full_depth():
    """One length where the baseline fits, one where it doesn't and shallower models say what it would take."""

    def line(T, name, ms, gib=None):
        return Line(T, name, None, ms, ms, ms, gib, 10.0 if gib else None)

    measured = (
        line(65536, BASELINE, 8000.0, 40.0),
        line(65536, LIGER, 6000.0, 35.0),
        line(65536, "lora", None),
        line(65536, OURS, 4000.0, 20.0),
        line(131072, BASELINE, None),
        line(131072, LIGER, None),
        line(131072, "lora", None),
        line(131072, OURS, 10000.0, 30.0),
    )
    shallow = (
        line(65536, BASELINE, 8400.0, 40.0),
        line(65536, OURS, 3960.0, 20.0),
        line(131072, BASELINE, 25000.0, 90.0),
        line(131072, OURS, 9900.0, 30.0),
    )
    card = ("a card", "llama-3-8b", 32, 32)
    return [Depth(Group(*card, None, measured), Group(*card, (2, 8), shallow))]


def test_the_speed_table_says_what_was_measured_and_what_was_not():
    lines = speed_table(steps_at_full_depth()).splitlines()
    assert lines[0].startswith("All layers, one sequence a step, on a card. Out of memory in all of these: `lora`. †: ")
    assert lines[4:] == [
        "| Llama-3-8B | 65,536 | `lora+ckpt` | 8.0 | 8,192 | ×1.00 | ×0.75 | 40.0 |",
        "| Llama-3-8B | 65,536 | `lora+ckpt+liger` | 6.0 | 10,923 | ×1.33 | ×1.00 | 35.0 |",
        "| Llama-3-8B | 65,536 | `lemo-backward`, spread 0.25 | 4.0 | 16,384 | ×2.00 | ×1.50 | 20.0 |",
        "| Llama-3-8B | 131,072 | `lora+ckpt` | out of memory (25.0 †) | 5,243 † | n/a | n/a | 90.0 † |",
        "| Llama-3-8B | 131,072 | `lora+ckpt+liger` | out of memory | n/a | n/a | n/a | n/a |",
        "| Llama-3-8B | 131,072 | `lemo-backward`, spread 0.25 | 10.0 | 13,107 | ×2.50 † | n/a | 30.0 |",
    ]
    assert speed_table([]) == ""


def test_devices_are_not_mixed_in_extrapolations(tmp_path):
    def row(gpu, layers, T, step_ms):
        details = {"layers": layers, "full_depth": 32, "weights_gib": 1.0, "out_of_memory": step_ms is None}
        details |= {"tflop": 1.0, "ceiling_tflop_per_s": 700.0}
        return Record(
            bench="step", method=BASELINE, shape="llama-3-8b", T=T, gpu=gpu, step_ms=step_ms, peak_gib=2.0,
            details=details,
        )  # fmt: skip

    for gpu, shallow in (("one", (2.0, 8.0)), ("two", (20.0, 80.0))):
        (tmp_path / gpu).mkdir()
        rows = [row(gpu, 32, 64, None), *(row(gpu, n, 64, ms) for n, ms in zip((2, 8), shallow, strict=True))]
        write(rows, tmp_path / gpu / "d_step-llama-3-8b.jsonl")
    one, two = full_depth(tmp_path)
    assert one.step_ms(64, BASELINE) == (pytest.approx(32.0), " †")
    assert two.step_ms(64, BASELINE) == (pytest.approx(320.0), " †")


def test_expected_and_measured_stand_side_by_side():
    found = steps_at_full_depth()
    lines = expected_table(found).splitlines()
    assert lines[3] == "| Llama-3-8B | 65,536 | `lemo-backward`, spread 0.25 | n/a | ×2.00 | ×2.12 | −1.0% |"
    assert lines[4].endswith("| `lora+ckpt` | n/a | out of memory | ×1.00 | n/a |")
    assert lines[5].endswith("| `lemo-backward`, spread 0.25 | n/a | ×2.50 † | ×2.53 | −1.0% |")
    assert expected_table([Depth(found[0].measured, None)]) == ""


def test_a_steps_parts_add_up_to_it():
    def row(method, setting, parts_ms, parts_tflop):
        details = {"layers": 4, "full_depth": 32, "weights_gib": 1.0, "out_of_memory": False, "tflop": 0.05}
        details |= {"ceiling_tflop_per_s": 1.0, "parts_ms": parts_ms, "parts_tflop": parts_tflop}
        return Record(
            bench="step", method=method, setting=setting, shape="tiny", T=64, gpu="a card", step_ms=100.0,
            details=details,
        )  # fmt: skip

    sparse = {"forward linears": 40.0, "backward attention": 30.0, "selection other": 2.0, "compensation other": 3.0}
    rows = [
        row(BASELINE, "default", {"rest linears": 60.0, "rest other": 30.0}, {}),
        row("lemo-backward", "spread 0.25", {**sparse, "rest other": 0.01}, {"forward linears": 0.02}),
    ]
    lines = parts_tables(rows).splitlines()
    assert lines[0] == "tiny, 4 layers, on a card, 64 tokens; ms."
    assert lines[4:10] == [
        "| attention | 0 | 30 |",
        "| linears | 60 | 40 |",
        "| other | 30 | 5 |",
        "| in no part | 10 | 25 |",
        "| the step | 100 | 100 |",
        "| its operations at the ceiling | 50 | 50 |",
    ]
    assert lines[14:] == [
        "|---|---|",
        "| forward linears | 40.0 (20.0) |",
        "| selection other | 2.0 |",
        "| compensation other | 3.0 |",
        "| backward attention | 30.0 |",
        "| in no part | 25.0 |",
        "| selection and compensation, of the step | 5.0% |",
    ]


def test_the_speed_figure_is_drawn(tmp_path):
    draw_speed(steps_at_full_depth(), tmp_path / "speed.svg")
    first = (tmp_path / "speed.svg").read_bytes()
    assert first.startswith(b"<?xml")
    draw_speed(steps_at_full_depth(), tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_bytes() == first
    draw_speed([], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_speed_figure_shows_what_the_records_say(tmp_path):
    # matplotlib notes each text it draws as paths in a comment, so versions with other outlines agree.
    def texts(path):
        return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))

    draw_speed(full_depth(RESULTS), tmp_path / "speed.svg")
    drawn = texts(tmp_path / "speed.svg")
    assert any("2.29×" in text for text in drawn)
    assert drawn == texts(ROOT / "docs" / "speed.svg"), "run: python -m benchmarks.table"


def test_the_papers_numbers_stand_beside_what_was_measured(tmp_path):
    def row(method, T, layers, step_ms, reserved, setting="default", gpu="a card"):
        return Record(
            bench="step", method=method, setting=setting, shape="llama-3-8b", T=T, gpu=gpu, step_ms=step_ms,
            peak_reserved_gib=reserved, details={"layers": layers, "full_depth": 32},
        )  # fmt: skip

    assert paper_table(tmp_path) == ""
    draw_paper(tmp_path, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    (tmp_path / "g").mkdir()
    half = ("lemo-forward", "lemo-forward+ckpt")
    rows = [
        row("lora", 4096, 4, 1.0, 1.0),
        row(half[0], 4096, 4, 1.0, 1.0, "keep 0.5"),
        row("lora", 4096, 32, 300.0, 40.0),
        row(half[0], 4096, 32, 200.0, 20.0, "keep 0.5"),
        row(half[0], 4096, 32, 100.0, 10.0, "keep 0.25"),
        row("lora", 8192, 32, None, None),
        row(half[0], 8192, 32, 400.0, 30.0, "keep 0.5"),
        row("lora+ckpt", 65536, 8, 4000.0, 9.0),
        row(half[1], 65536, 8, 2000.0, 5.0, "keep 0.5"),
        row(half[1], 131072, 8, 2000.0, 5.0, "keep 0.5", gpu="another"),
    ]
    write(rows, tmp_path / "g" / "d_step-forward-long.jsonl")
    assert {key: pair.layers for key, pair in pairs(tmp_path).items()} == {
        ("llama-3-8b", 4096): 32,
        ("llama-3-8b", 8192): 32,
    }
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in paper_table(tmp_path).splitlines()]
    assert lines[0][2] == "ours, a card"
    cells = {what: (theirs, ours) for what, theirs, ours in lines[2:]}
    memory = "{} tokens: memory, LoRA → tokens left out".format
    assert cells[memory("Llama-3-8B, 4,096")] == ("48.3 GB → 31.0 GB, ×1.56", "40.0 GiB → 20.0 GiB, ×2.00")
    assert cells[memory("Llama-3-8B, 8,192")] == ("79.0 GB → 43.5 GB, ×1.82", "out of memory → 30.0 GiB")
    assert cells[memory("OPT-350M, 65,536")] == ("out of memory → 55.0 GB", "not measured")
    assert cells["Llama-2-7B, 65,536 tokens: a step, LoRA → tokens left out"][1] == "4,000 → 2,000 ms, ×2.00"
    draw_paper(tmp_path, tmp_path / "some.svg")
    assert (tmp_path / "some.svg").exists()


def test_the_papers_figure_shows_what_the_records_say(tmp_path):
    def texts(path):
        return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))

    draw_paper(RESULTS, tmp_path / "paper.svg")
    drawn = texts(tmp_path / "paper.svg")
    assert any("the paper" in text for text in drawn)
    assert drawn == texts(ROOT / "docs" / "paper-figures.svg"), "run: python -m benchmarks.table"


@pytest.mark.parametrize("study", studies(named("quality-*")), ids=lambda study: study.task)
def test_the_quality_figures_show_what_the_records_say(study, tmp_path):
    def texts(path):
        return re.findall(r">([^<>]+)</text>", path.read_text(encoding="utf-8"))

    draw_frontier(study, tmp_path / "frontier.svg")
    drawn = texts(tmp_path / "frontier.svg")
    assert {str(row.number) for row in study.rows} <= {text.partition(":")[0] for text in drawn}
    assert drawn == texts(ROOT / "docs" / f"quality-{study.task}.svg"), "run: python -m benchmarks.table"
    draw_depths(study, tmp_path / "depths.svg")
    assert (tmp_path / "depths.svg").exists() == (study.task == "retrieval")
    if study.task == "retrieval":
        assert texts(tmp_path / "depths.svg") == texts(ROOT / "docs" / "quality-retrieval-depths.svg")
