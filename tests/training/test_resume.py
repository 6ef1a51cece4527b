"""`kill -9` at any moment and `--resume` give, bit for bit, the adapter of a run that was left alone (CPU, fp32)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from crash import killed_run

from lemo.errors import UserError
from lemo.training import Summary, finetune
from tiny_run import run_settings, save_model, save_texts

# 9 training documents: with accumulation 2 an epoch has 5 steps, the last of one micro-batch; 7 steps cross epochs.
VARIANTS = {
    "energy": ("training.steps=7", "sparsity.fidelity=0.8"),
    "segments": (
        "training.steps=7",
        "training.accumulation=2",
        "sparsity.policy=segments",
        "data.completion_tokens=0",
        "lora.dropout=0.2",
    ),
    "dense": ("training.steps=7", "sparsity.mode=dense", "lora.dropout=0.2", "training.batch_size=2"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    save_model(root / "model")
    save_texts(root / "data")
    return root


@pytest.fixture(scope="module")
def references(place: Path) -> dict[str, tuple[Path, Summary]]:
    return {}


def settings(place: Path, output: Path, variant: str) -> Any:
    return run_settings(place / "model", place / "data", output, *VARIANTS[variant])


def reference(place: Path, references: dict[str, tuple[Path, Summary]], variant: str) -> tuple[Path, Summary]:
    if variant not in references:
        output = place / f"reference-{variant}"
        references[variant] = (output, finetune(settings(place, output, variant)))
    return references[variant]


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a step's line says about learning; times and memory differ from run to run."""
    timing = {"tokens_per_s", "step_s", "peak_gib", "peak_reserved_gib"}
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


@pytest.mark.parametrize(
    ("variant", "moment", "step"),
    [
        ("energy", "in a step", 4),
        ("energy", "in a metrics line", 5),
        ("energy", "in a save", 4),
        ("energy", "before the rename", 6),
        ("energy", "in the rotation", 6),
        ("segments", "in a step", 6),
        ("segments", "before its save", 4),
        ("segments", "before the rename", 7),
        ("dense", "in a step", 7),
    ],
)
def test_a_killed_run_resumes_bitwise(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path, variant: str, moment: str, step: int
) -> None:
    expected, summary = reference(place, references, variant)
    config = settings(place, tmp_path / "run", variant)
    killed_run(config, moment, step)
    assert not (tmp_path / "run/adapter").exists()

    resumed = finetune(config, resume=True)

    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (expected / weights).read_bytes()
    assert [record["step"] for record in steps(tmp_path / "run")] == list(range(1, 8))
    assert same(steps(tmp_path / "run")) == same(steps(expected))
    assert (resumed.loss_before, resumed.loss_after) == (summary.loss_before, summary.loss_after)
    assert resumed.tokens == summary.tokens
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert not list((tmp_path / "run").rglob("training_args.bin"))


def test_a_run_survives_being_killed_twice(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path
) -> None:
    expected, _ = reference(place, references, "segments")
    config = settings(place, tmp_path / "run", "segments")
    killed_run(config, "in a save", 4)
    killed_run(config, "in a step", 6, resume=True)
    finetune(config, resume=True)
    assert same(steps(tmp_path / "run")) == same(steps(expected))


def test_a_finished_run_resumes_to_the_same_adapter(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path
) -> None:
    expected, summary = reference(place, references, "energy")
    shutil.copytree(expected, tmp_path / "run")
    resumed = finetune(settings(place, tmp_path / "run", "energy"), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (expected / weights).read_bytes()
    assert resumed.loss_after == summary.loss_after
    assert steps(tmp_path / "run") == steps(expected)


def test_draws_and_dropout_make_the_test_above_strict(place: Path, references: dict[str, tuple[Path, Summary]]) -> None:
    """Another seed changes the adapter, so equal adapters aren't a matter of course."""
    expected, _ = reference(place, references, "segments")
    config = run_settings(
        place / "model", place / "data", place / "other-seed", *VARIANTS["segments"], "training.seed=1"
    )
    finetune(config)
    weights = "adapter/adapter_model.safetensors"
    assert (place / "other-seed" / weights).read_bytes() != (expected / weights).read_bytes()


def damaged(place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path) -> Path:
    expected, _ = reference(place, references, "energy")
    shutil.copytree(expected, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "adapter_model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_with_the_way_back(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path, name: str
) -> None:
    run = damaged(place, references, tmp_path)
    content = bytearray((run / "checkpoint-7" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoint-7" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"checkpoint-7/{name} is damaged; delete \S*checkpoint-7 to fall back to"):
        finetune(settings(place, run, "energy"), resume=True)

    shutil.rmtree(run / "checkpoint-7")
    resumed = finetune(settings(place, run, "energy"), resume=True)
    assert resumed.steps == 7


def test_missing_files_and_manifests_are_named(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path
) -> None:
    run = damaged(place, references, tmp_path)
    (run / "checkpoint-7/scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-7/scheduler\.pt is missing"):
        finetune(settings(place, run, "energy"), resume=True)
    (run / "checkpoint-7/lemo.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint-7/lemo\.json is missing or damaged"):
        finetune(settings(place, run, "energy"), resume=True)


def test_a_foreign_checkpoint_is_refused(
    place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path
) -> None:
    run = damaged(place, references, tmp_path)
    save_model(tmp_path / "model", seed=1)
    save_texts(tmp_path / "data", seed=1)
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    others = {
        r"sparsity\.fidelity was 0\.8, now 0\.7": settings(place, run, "energy").model_copy(
            update={"sparsity": settings(place, run, "energy").sparsity.model_copy(update={"fidelity": 0.7})}
        ),
        "the model weights differ": run_settings(tmp_path / "model", place / "data", run, *VARIANTS["energy"]),
        "the training data differ": run_settings(place / "model", tmp_path / "data", run, *VARIANTS["energy"]),
    }
    for message, config in others.items():
        with pytest.raises(UserError, match=rf"belongs to another run \({message}.*choose another --output"):
            finetune(config, resume=True)
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_model_and_data_may_move(place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path) -> None:
    run = damaged(place, references, tmp_path)
    shutil.copytree(place / "model", tmp_path / "elsewhere/model")
    shutil.copytree(place / "data", tmp_path / "elsewhere/data")
    config = run_settings(tmp_path / "elsewhere/model", tmp_path / "elsewhere/data", run, *VARIANTS["energy"])
    assert finetune(config, resume=True).steps == 7


def test_nothing_to_resume(place: Path, tmp_path: Path) -> None:
    config = settings(place, tmp_path / "run", "energy")
    with pytest.raises(UserError, match="there is no run in"):
        finetune(config, resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        finetune(config, resume=True)


def test_lost_metrics_are_not_made_up(place: Path, references: dict[str, tuple[Path, Summary]], tmp_path: Path) -> None:
    run = damaged(place, references, tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: doesn't hold each of the steps 1 to 7 once"):
        finetune(settings(place, run, "energy"), resume=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], "oops\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: not a step"):
        finetune(settings(place, run, "energy"), resume=True)
