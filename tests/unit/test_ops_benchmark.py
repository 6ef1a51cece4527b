"""`lemo bench ops`: rows, resuming, memory that runs out, what is counted, the page, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lemo.bench import op_movement, ops, records
from lemo.bench.op_movement import kept_rows
from lemo.bench.ops_config import OpsConfig
from lemo.bench.records import Record
from lemo.errors import UserError
from lemo.report import build_records
from lemo.report.ops import op_lines, ops_markdown

MOVEMENT: dict[str, Any] = {"width": 8, "lengths": [96], "keeps": [0.5], "block_size": 16}
LOSS: dict[str, Any] = {"width": 8, "vocabulary": 40, "lengths": [30], "codes": ["lemo", "logits"]}
OPERATIONS = ("read and norm", "add", "read, norm, add", "read, add", "backward")


def benchmark(output: Path, **changes: Any) -> OpsConfig:
    values = {
        "movement": MOVEMENT,
        "loss": LOSS,
        "warm_up": 0,
        "repeats": 2,
        "dtype": "float32",
        "device": "cpu",
        "output": str(output),
    }
    return OpsConfig.model_validate(values | changes)


def test_every_operation_by_every_implementation(tmp_path: Path) -> None:
    rows = ops.run_ops(benchmark(tmp_path / "b"))
    details = [row.details or {} for row in rows]
    names = [(d["op"], d["implementation"]) for d in details]
    assert names == [
        *((f"movement: {op}", by) for op in OPERATIONS for by in ("twin", "naive")),
        ("movement: copy", "torch"),
        ("loss", "lemo"),
        ("loss", "logits"),
    ]
    for row in rows:
        assert row.step_ms_min <= row.step_ms <= row.step_ms_max  # type: ignore[operator]
    unit = 96 * 8 * 4 / 1e9
    by_name = dict(zip(names, details, strict=True))
    assert by_name["movement: read, add", "twin"]["gigabytes"] == pytest.approx(2.5 * unit)
    assert by_name["movement: read, add", "naive"]["gigabytes"] == pytest.approx(6 * unit)
    assert by_name["movement: copy", "torch"]["gigabytes"] == pytest.approx(unit)
    assert by_name["loss", "lemo"]["tflop"] == pytest.approx(4 * 30 * 8 * 40 / 1e12)
    assert rows == records.read(tmp_path / "b" / "records.jsonl")
    lines = op_lines(rows)
    assert next(line for line in lines if line.details.op == "movement: read, add").by_bytes == pytest.approx(2.4)
    assert len(ops_markdown(lines).splitlines()) == 4 + len(OPERATIONS) + 2
    assert ops_markdown([]) == ""
    assert "movement: backward" in build_records(tmp_path / "b").read_text()


def test_the_compact_table_has_a_row_an_operation_and_length() -> None:
    def row(op: str, by: str, T: int, keep: float | None, ms: float | None, gib: float | None) -> Record:
        details = {"op": op, "implementation": by, "gigabytes": 2.0 if by == "naive" else 1.0, "tflop": 0.0}
        details |= {"floor_ms": 1.0, "copy_gb_per_s": 1.0, "ceiling_tflop_per_s": 1.0, "above_gib": gib}
        return Record(
            bench="op", method="lora", shape="width 8", T=T, keep=keep, step_ms=ms, gpu="a card", details=details
        )

    rows = [
        row("movement: add", by, T, keep, ms * keep, ms / 10)
        for T in (64, 128)
        for keep in (0.5, 0.25, 0.125)
        for by, ms in (("kernels", 4.0), ("twin", 40.0), ("naive", 12.0))
    ]
    rows += [row("loss", "lemo", 64, None, 2.0, 0.1), row("loss", "liger", 64, None, 4.0, 0.0)]
    rows.append(row("loss", "logits", 64, None, None, None))
    text = ops_markdown(op_lines(rows)).splitlines()
    both = "2.000 · 1.000 | ×3.00 · ×3.00 | ×2.00 · ×2.00 | 50% · 100% | 0.400 · 0.400 | 1.200 · 1.200 |"
    assert text[4:] == [
        f"| movement: add, width 8 | 64 | {both}",
        f"| movement: add, width 8 | 128 | {both}",
        "| loss, width 8 | 64 | 2.000 | n/a | ×1.00 | 50% | 0.100 | out of memory |",
        "| loss, width 8, by liger | 64 | 4.000 | n/a | ×1.00 | 25% | 0.000 | out of memory |",
    ]


def test_a_stopped_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ops.run_ops(benchmark(tmp_path / "b", movement=None))
    measured: list[str] = []
    whole = ops._measure
    monkeypatch.setattr(ops, "_measure", lambda c, op, d: measured.append(op.op) or whole(c, op, d))
    rows = ops.run_ops(benchmark(tmp_path / "b"), resume=True)
    assert rows[: len(first)] == first
    assert "loss" not in measured
    assert len(measured) == 2 * len(OPERATIONS) + 1
    with pytest.raises(UserError, match="repeats differ from the benchmark"):
        ops.run_ops(benchmark(tmp_path / "b", repeats=3), resume=True)
    with pytest.raises(UserError, match="go on with the benchmark"):
        ops.run_ops(benchmark(tmp_path / "b"))


def test_memory_that_runs_out_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(ops.loss_ops.__globals__["_CODES"], "logits", full)
    rows = ops.run_ops(benchmark(tmp_path / "b", movement=None))
    assert [(row.step_ms is None, (row.details or {})["out_of_memory"]) for row in rows] == [
        (False, False),
        (True, True),
    ]
    assert "out of memory" in build_records(tmp_path / "b").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"movement": None, "loss": None}, "nothing to measure"),
        ({"movement": MOVEMENT | {"keeps": [0.0]}}, "greater than 0"),
        ({"loss": LOSS | {"codes": ["mine"]}}, "'lemo', 'liger', 'cce' or 'logits'"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, **changes)


def test_libraries_that_are_missing_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss code liger needs"):
        ops.run_ops(benchmark(tmp_path / "b", loss=LOSS | {"codes": ["lemo", "liger"]}))
    assert not (tmp_path / "b").exists()


def test_kept_rows_are_blocks_with_the_first_and_the_last() -> None:
    rows = kept_rows(1000, 0.25, 64)
    kept = torch.zeros(1000, dtype=torch.bool)
    kept[rows] = True
    blocks = torch.stack([part.float().mean() for part in kept.split(64)])
    assert set(blocks.tolist()) == {0.0, 1.0}
    assert blocks.sum() == 4
    assert blocks[0] == blocks[-1] == 1
    assert torch.equal(rows, rows.sort().values)


@pytest.mark.parametrize("op", OPERATIONS)
def test_implementations_do_the_same(op: str, device: torch.device) -> None:
    """What is timed is the same work; the kernels run in Triton's interpreter on a CPU."""
    pytest.importorskip("triton")
    calls = next(calls for name, calls, _ in op_movement._ALL if name == op)
    assert list(calls) == ["kernels", "twin", "naive"]
    rows = kept_rows(96, 0.5, 16)
    kernels, *others = (
        op_movement._preparation(call, 96, 8, rows, torch.float32, str(device))()() for call in calls.values()
    )
    for other in others:
        for mine, theirs in zip(kernels, other, strict=True):
            torch.testing.assert_close(mine, theirs)
