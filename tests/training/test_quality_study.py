"""A quality study end to end on a tiny model: the same batches for all, whole records, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lemo.bench import quality, runs
from lemo.bench.config import QualityConfig, load_quality
from lemo.bench.quality import run_study
from lemo.bench.records import Record, read
from lemo.bench.runs import Laboratory, StepTime
from lemo.errors import UserError
from lemo.training.trainer import LemoTrainer
from tiny_run import save_model, save_texts

BACKWARD = {"method": "lemo-backward", "sparsity": {"fidelity": 0.9, "block_size": 16}}
EXACT = {"method": "lemo-backward", "setting": "fidelity 1", "sparsity": {"fidelity": 1.0, "block_size": 16}}
FORWARD = {
    "method": "lemo-forward",
    "setting": "keep 0.5",
    "sparsity": {"mode": "forward", "keep": 0.5, "block_size": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    save_model(root / "model")
    save_texts(root / "data", count=30)
    return root


def study(place: Path, output: Path, *methods: dict[str, Any], **changes: Any) -> QualityConfig:
    values: dict[str, Any] = {
        "task": {
            "kind": "sft",
            "sources": [str(place / "data")],
            "heldout_share": 0.3,
            "heldout_sequences": 3,
            "max_tokens": 128,
            "min_tokens": 40,
            "completion_tokens": [8, 24],
            "buckets": 4,
        },
        "methods": methods,
        "seeds": [0],
        "model": {"name": str(place / "model")},
        "lora": {"r": 4},
        "training": {"steps": 4, "learning_rate": 5e-3, "warmup_steps": 1, "save_every": 0},
        "timed_steps": 0,
        "device": "cpu",
        "commit": "abc",
        "output": str(output),
    }
    return QualityConfig.model_validate(values | changes)


def retrieval(place: Path, output: Path, *methods: dict[str, Any], **changes: Any) -> QualityConfig:
    task = {
        "kind": "retrieval",
        "sources": [str(place / "data")],
        "heldout_share": 0.3,
        "heldout_sequences": 2,
        "train_sequences": 6,
        "max_tokens": 250,
        "lengths": [250],
        "keys": 2,
        "questions": 1,
        "depths": 2,
        "buckets": 2,
    }
    return study(place, output, *methods, task=task, **changes)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The token ids of every training step, one list a run."""
    seen: list[list[tuple[int, ...]]] = []
    train, step = LemoTrainer.train, LemoTrainer.training_step

    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([])
        return train(self, *args, **kwargs)

    def note(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen[-1].append(tuple(inputs["input_ids"].flatten().tolist()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LemoTrainer, "train", begin)
    monkeypatch.setattr(LemoTrainer, "training_step", note)
    return seen


def named(rows: list[Record], method: str, setting: str = "default", seed: int = 0) -> Record:
    (row,) = [r for r in rows if (r.bench, r.method, r.setting, r.seed) == ("quality", method, setting, seed)]
    return row


def test_every_method_gets_the_same_batches_and_the_same_start(place, tmp_path, batches):
    methods = (BACKWARD, {"method": "labels-only"}, {"method": "random-blocks", "setting": "0.6", "keep": 0.6})
    truncated = {"method": "truncated", "setting": "0.5", "keep": 0.5}
    stopped = {"method": "stopped", "setting": "0.75", "keep": 0.75}
    rows = run_study(study(place, tmp_path / "s", *methods, truncated, stopped, seeds=[0, 1]))
    runs_of_seed = [batches[i::2] for i in range(2)]
    for seed in range(2):
        first, *others, cut, short_run = runs_of_seed[seed]
        assert len(first) == 4
        assert short_run == first[:3]
        assert all(other == first for other in others)
        assert all(
            long[-len(short) :] == short and len(short) < len(long) for short, long in zip(cut, first, strict=True)
        )
    assert runs_of_seed[0][0] != runs_of_seed[1][0]
    assert len(rows) == 6 * 2
    assert named(rows, "stopped", "0.75").keep == 0.75
    assert 0 < named(rows, "stopped", "0.75").gain_retained != 1
    assert len({row.loss_before for row in rows}) == 1
    assert all(row.gain_retained == 1.0 for row in rows if row.method == "lora+ckpt")
    assert named(rows, "labels-only").keep < 1.0
    assert named(rows, "lemo-backward").keep < 1.0


def test_gain_retained_is_the_share_of_the_baselines_gain_and_exact_where_nothing_is_left_out(place, tmp_path):
    rows = run_study(study(place, tmp_path / "s", BACKWARD, EXACT))
    baseline, exact, sparse = (
        named(rows, "lora+ckpt"),
        named(rows, "lemo-backward", "fidelity 1"),
        named(rows, "lemo-backward"),
    )
    assert exact.gain_retained == pytest.approx(1.0, abs=1e-3)
    gain = (sparse.loss_before - sparse.loss_after) / (baseline.loss_before - baseline.loss_after)
    assert sparse.gain_retained == pytest.approx(gain)
    assert sparse.fidelity >= 0.9
    assert sparse.loss_after != baseline.loss_after
    positions = sparse.details["by_position"]
    assert sum(bucket["tokens"] for bucket in positions) > 0
    assert [bucket["end"] for bucket in positions] == [32, 64, 96, 128]
    assert read(tmp_path / "s" / "records.jsonl") == rows


def test_forward_mode_is_judged_dense_and_sparse(place, tmp_path):
    row = named(run_study(study(place, tmp_path / "s", FORWARD)), "lemo-forward", "keep 0.5")
    assert row.loss_after_sparse is not None
    assert row.loss_after_sparse != row.loss_after
    assert named(read(tmp_path / "s" / "records.jsonl"), "lora+ckpt").loss_after_sparse is None


def test_a_study_goes_on_where_it_stopped(place, tmp_path, monkeypatch):
    whole = run_study(study(place, tmp_path / "whole", BACKWARD, EXACT))
    train = Laboratory.train

    def stop(self, method, seed, steps):
        if method.setting == "fidelity 1":
            raise KeyboardInterrupt
        return train(self, method, seed, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Laboratory, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(study(place, tmp_path / "s", BACKWARD, EXACT))
    half = read(tmp_path / "s" / "records.jsonl")
    assert [row.setting for row in half] == ["default", "default"]
    rows = run_study(study(place, tmp_path / "s", BACKWARD, EXACT), resume=True)
    assert rows[:2] == half
    assert [row.loss_after for row in rows] == [row.loss_after for row in whole]


def test_processes_side_by_side_find_the_same(place, tmp_path):
    alone = run_study(study(place, tmp_path / "a", BACKWARD))
    together = run_study(study(place, tmp_path / "b", BACKWARD, workers=2))
    for row in alone:
        other = named(together, row.method)
        assert other.loss_after == pytest.approx(row.loss_after, abs=1e-5)
        assert (row.concurrent, other.concurrent) == (1, 2)


def test_equal_time_gives_a_faster_method_more_steps(place, tmp_path, batches, monkeypatch):
    def timed(self, method, steps):
        return StepTime(10.0 if method.method == "lora+ckpt" else 5.0, 4.0, 11.0, 1000.0)

    monkeypatch.setattr(Laboratory, "time", timed)
    row = named(
        run_study(study(place, tmp_path / "s", BACKWARD | {"equal_time": True}, timed_steps=2)), "lemo-backward"
    )
    assert [len(run) for run in batches] == [4, 4, 8]
    assert (row.steps, row.steps_equal_time, row.step_ms) == (4, 8, 5.0)
    assert row.loss_after_equal_time != row.loss_after
    assert row.gain_retained_equal_time == pytest.approx(
        row.gain_retained * (row.loss_before - row.loss_after_equal_time) / (row.loss_before - row.loss_after)
    )


def test_steps_are_timed_alone_after_a_warm_up(place, tmp_path, batches):
    untimed = {"method": "labels-only"}
    rows = run_study(study(place, tmp_path / "s", BACKWARD | {"timed": True}, untimed, timed_steps=2))
    assert [r.method for r in rows if r.bench == "step"] == ["lora+ckpt", "lemo-backward"]
    assert named(rows, "labels-only").step_ms is None
    assert [len(run) for run in batches] == [runs.WARM_UP + 2] * 2 + [4, 4, 4]
    times = [row for row in rows if row.bench == "step"]
    assert [row.method for row in times] == ["lora+ckpt", "lemo-backward"]
    for row in times:
        assert 0 < row.step_ms_min <= row.step_ms <= row.step_ms_max
        assert named(rows, row.method).step_ms == row.step_ms


def test_retrieval_is_judged_by_depth(place, tmp_path):
    row = named(run_study(retrieval(place, tmp_path / "s", BACKWARD)), "lemo-backward")
    cells = row.details["by_depth"]
    assert sum(cell["answers"] for cell in cells) == 2
    assert {cell["length"] for cell in cells} == {250}
    assert row.accuracy_after is not None
    assert 0.0 <= row.accuracy_after <= 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"steps": 5, "save_every": 0}}, "training differ"),
        ({"methods": [BACKWARD | {"sparsity": {"fidelity": 0.5}}]}, "other knobs"),
    ],
)
def test_rows_that_cant_be_compared_arent_mixed(place, tmp_path, change, message):
    run_study(study(place, tmp_path / "s", BACKWARD))
    with pytest.raises(UserError, match=message):
        run_study(study(place, tmp_path / "s", **{"methods": [BACKWARD]} | change), resume=True)


def test_another_text_isnt_mixed_in(place, tmp_path):
    save_texts(tmp_path / "data", count=30)
    config = study(tmp_path, tmp_path / "s", model={"name": str(place / "model")})
    run_study(config)
    (tmp_path / "data" / "07.txt").write_text("something else " * 8)
    with pytest.raises(UserError, match="text of task"):
        run_study(config, resume=True)


def test_what_cant_work_is_refused_before_any_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Laboratory, "train", lambda *_: pytest.fail("trained"))
    small = {"method": "random-blocks", "setting": "small", "keep": 0.01}
    with pytest.raises(UserError, match="hold labels"):
        run_study(study(place, tmp_path / "a", small))
    absent = {"mode": "forward", "calibration": str(tmp_path / "absent")}
    with pytest.raises(UserError, match=r"lemo-forward \(lost\): .*absent"):
        run_study(study(place, tmp_path / "a", {"method": "lemo-forward", "setting": "lost", "sparsity": absent}))
    mixed = {"mode": "forward", "keep": 0.5, "dense_share": 0.5}
    timed = {"method": "lemo-forward", "timed": True, "sparsity": mixed}
    with pytest.raises(UserError, match="no one time"):
        run_study(study(place, tmp_path / "a", timed, timed_steps=2))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        run_study(study(place, tmp_path / "b"))
    with pytest.raises(UserError, match="no study to resume"):
        run_study(study(place, tmp_path / "b"), resume=True)
    assert not (tmp_path / "a").exists()


def test_a_process_that_dies_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "_train", _die)
    with pytest.raises(UserError, match=r"process died .* go on with --resume"):
        run_study(study(place, tmp_path / "s", workers=2))


def _die(job: Any) -> None:
    import os

    os._exit(9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: {kind: sft, lenghts: [8]}", "task.lenghts; did you mean task.lengths"),
        ("task: {kind: sft}\nmethods: [{method: lemo-backward}]", r"methods\[0\].*needs it"),
        ("task: {kind: sft}\nmethods: [{method: truncated}]", "needs a keep"),
        ("task: {kind: sft}\nmethods: [{method: stopped, keep: 0.5, equal_time: true}]", "takes the baseline's time"),
        ("task: {kind: sft}\nmethods: [{method: lemo-backward, sparcity: {}}]", r"methods\[0\].sparcity; did you mean"),
        ("task: {kind: lm}\nmethods: [{method: labels-only}]", "leaves nothing out"),
        ("task: {kind: sft}\nmethods: [{method: longlora}, {method: longlora}]", "name the settings apart"),
        ("task: {kind: sft}\nmethods: [{method: lora+ckpt, groups: 4}]", "groups belong to longlora"),
        ("task: {kind: retrieval, keys: 4, questions: 9}", "can't exceed keys"),
        ("task: {kind: lm}\nseeds: []", "seeds"),
        ("methods: []", "task: must be given"),
    ],
)
def test_mistakes_in_the_file_are_found_first(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_quality(path)


def test_the_committed_studies_load():
    folder = Path(__file__).parents[2] / "benchmarks" / "quality"
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) >= 4
    for path in paths:
        assert load_quality(path).methods
