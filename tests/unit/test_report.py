"""The report: complete, self-contained and readable for finished, unfinished and odd runs; refused for damaged ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from html_page import Page
from lemo.errors import UserError
from lemo.report import build
from lemo.report.figures import _binned, _moving_mean
from lemo.report.records import read_run
from synthetic_run import SAMPLE, write_run


def page_of(directory: Path) -> Page:
    path = build(directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_shows_its_numbers_plots_texts_and_settings(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for shown in (
        "1.6931 → 1.6172", "−0.0759", "23.4 %", "0.985", "181 tokens/s", "2.43 GiB", "12 min", "8 documents",
        "loss (nats per label)", "memory (GiB)", "optimizer step", "289 (1,116,256 tokens)",
        "1 file isn't UTF-8 & was left out", "max_tokens: 4096", "2.13.0",
        "the whole process since its start",
    ):  # fmt: skip
        assert shown in page.text
    for text in SAMPLE.values():
        assert " ".join(text.split()) in page.text
    assert page.labels == [
        "Training loss by step",
        "Held-out loss by position, before and after",
        "Kept share of tokens by layer and step",
        "Fidelity by layer",
        "Peak memory by step",
    ]
    assert "not finished" not in page.text


def test_the_page_loads_nothing_and_its_ids_are_unique(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    page = page_of(directory)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.loads if target.startswith("#")} <= set(page.ids)
    text = (directory / "report.html").read_text()
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert "@import" not in text
    # No placeholder colour is left, so every line follows the theme.
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", text)
    assert str(tmp_path) not in text


def test_the_same_run_gives_the_same_page_and_matplotlib_stays_as_it_was(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    before = dict(matplotlib.rcParams)
    first = build(directory).read_bytes()
    assert build(directory).read_bytes() == first
    assert dict(matplotlib.rcParams) == before
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.yaml", "metrics.jsonl", "report.html", "summary.json",
    ]  # fmt: skip


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=4, finished=False))
    assert "This run is not finished." in page.text
    assert "4 of 8 steps" in page.text
    assert page.labels[0] == "Training loss by step"
    assert "Fidelity by layer" in page.labels


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", finished=False)
    for content in ("", None, '{"step": 1, "lo'):
        if content is None:
            (directory / "metrics.jsonl").unlink()
        else:
            (directory / "metrics.jsonl").write_text(content)
        page = page_of(directory)
        assert "No step is recorded yet." in page.text
        assert page.labels == []


def test_a_step_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=3, finished=False)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.')
    assert len(read_run(directory).steps) == 3


def test_modes_show_what_they_have(tmp_path: Path) -> None:
    forward = page_of(write_run(tmp_path / "forward", mode="forward", cuda=True))
    assert "Mode forward measures no fidelity." in forward.text
    assert {"attention", "MLP"} <= {word.strip() for word in forward.words}
    assert "reserved by the allocator" in forward.text
    assert "tensors on the device" in forward.text
    dense = page_of(write_run(tmp_path / "dense", mode="dense"))
    assert dense.labels == [
        "Training loss by step", "Held-out loss by position, before and after", "Peak memory by step",
    ]  # fmt: skip


def test_gradient_agreement_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    agreement = {"cosine": 0.61234, "norm_ratio": 1.204, "sequences": 4}
    page = page_of(write_run(tmp_path / "with", gradient_agreement=agreement))
    assert "on 4 training sequences: cosine 0.612, norm ratio 1.204" in page.text
    assert "norm ratio" not in page_of(write_run(tmp_path / "without", gradient_agreement=None)).text


def test_no_evaluation_and_labels_at_one_place(tmp_path: Path) -> None:
    nothing = write_run(tmp_path / "a", loss_before=None, loss_after=None, by_position=[], sample=None, data={})
    page = page_of(nothing)
    assert "held-out loss" not in [word.strip() for word in page.words]
    assert "One held-out completion" not in page.text
    empty = {"tokens": 0, "before": None, "after": None}
    buckets = [
        {"start": 0, "end": 3584, **empty},
        {"start": 3584, "end": 4096, "tokens": 9, "before": 2.0, "after": 1.5},
    ]
    page = page_of(write_run(tmp_path / "b", by_position=buckets))
    assert "All 9 held-out labels lie at positions 3,584 to 4,095" in page.text


def test_one_step_and_one_layer_and_losses_that_were_not_finite(tmp_path: Path) -> None:
    assert len(page_of(write_run(tmp_path / "tiny", steps=1, layers=1)).labels) == 5
    directory = write_run(tmp_path / "null", steps=80, finished=False)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-30:]:
        line["loss"] = None
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(directory)
    assert "not finite" in page.text
    assert "its mean over 4 steps" in page.text


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&amp; \ud800"
    directory = write_run(
        tmp_path / "<b>run", sample=dict.fromkeys(SAMPLE, evil), device="<i>gpu", versions={"<u>": "<u>"}
    )
    build(directory)
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp; ?" in text
    assert not re.search(r"<[biu]>", text)


def damage(directory: Path, name: str, line: int, old: str, new: str) -> None:
    lines = (directory / name).read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    (directory / name).write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "line", "old", "new", "message"),
    [
        ("metrics.jsonl", 3, '{"step"', '"step"', r"metrics\.jsonl:3: not valid JSON"),
        ("metrics.jsonl", 2, '"step": 2', '"step": "two"', r"metrics\.jsonl:2: step: "),
        ("metrics.jsonl", 2, '"peak_gib"', '"peak"', r"metrics\.jsonl:2: peak_gib: Field required"),
        ("metrics.jsonl", 2, '"keep": [[', '"keep": [[1.0, 1.0], [', r"metrics\.jsonl:2: keep has 4 layers"),
        ("metrics.jsonl", 2, '"step": 2', '"step": 1', r"metrics\.jsonl:2: step 1 comes after step 1"),
        ("summary.json", 8, '"loss_after":', '"loss_after"', r"summary\.json:8: not valid JSON"),
        ("summary.json", 8, "1.6172", '"low"', r"summary\.json:8: loss_after: "),
        ("summary.json", 2, '"mode"', '"mood"', r"summary\.json:1: mode: Field required"),
        ("config.yaml", 1, "model:", "modle:", r"config\.yaml: unknown key modle"),
    ],
)
def test_damage_is_named_with_file_and_line(
    tmp_path: Path, name: str, line: int, old: str, new: str, message: str
) -> None:
    directory = write_run(tmp_path / "run", steps=4, layers=3)
    damage(directory, name, line, old, new)
    with pytest.raises(UserError, match=message):
        build(directory)
    assert not (directory / "report.html").exists()


def test_bytes_that_are_not_text_are_named_with_their_line(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=2)
    content = (directory / "metrics.jsonl").read_bytes().split(b"\n")
    content[1] = b"\xff" + content[1]
    (directory / "metrics.jsonl").write_bytes(b"\n".join(content))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not UTF-8"):
        build(directory)


def test_what_is_not_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        build(tmp_path / "absent")
    with pytest.raises(UserError, match="isn't a run directory"):
        build(tmp_path)


def test_the_moving_mean_leaves_unknown_numbers_out() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan])
    np.testing.assert_allclose(_moving_mean(values, 2), [1.0, 2.0, 3.0, 5.0, 5.0, np.nan])


def test_long_runs_are_binned_by_mean() -> None:
    values = np.arange(1000.0)[None]
    cells, edges = _binned(values, list(range(1, 1001)))
    assert cells.shape == (1, 180)
    assert cells[0, 0] == pytest.approx(np.arange(6).mean())
    assert edges == [0.5, 1000.5]


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=2, layers=2)
    code = f"import sys; from pathlib import Path; from lemo.report import build; build(Path({str(directory)!r})); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
