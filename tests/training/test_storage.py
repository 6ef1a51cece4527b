"""A full disk: refused before a save begins, or in the middle of one; earlier checkpoints stay whole."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lemo.config import RunConfig
from lemo.errors import UserError
from lemo.training import finetune
from lemo.training.storage import require_space, storage_errors, write_json, write_text
from lemo.training.trainer import LemoTrainer
from tiny_run import run_settings, save_model, save_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    save_model(root / "model")
    save_texts(root / "data")
    return root


def settings(place: Path, output: Path) -> RunConfig:
    return run_settings(place / "model", place / "data", output, "training.steps=4", "evaluation.documents=0")


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


FAILURES: dict[str, BaseException] = {
    "operating system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, part: str
) -> None:
    original = getattr(LemoTrainer, part)
    first: dict[str, str] = {}

    def fails(trainer: LemoTrainer, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        if trainer.state.global_step == 4:
            first.update(hashes(tmp_path / "run/checkpoint-2"))
            raise FAILURES[kind]

    config = settings(place, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(LemoTrainer, part, fails)
        message = r"(no space left|the disk refused data).* while writing checkpoint-4 .*earlier checkpoints are intact"
        with pytest.raises(UserError, match=message):
            finetune(config)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-2", "config.yaml", "metrics.jsonl"]
    assert hashes(tmp_path / "run/checkpoint-2") == first

    assert finetune(config, resume=True).steps == 4


def test_a_save_that_cannot_fit_is_not_begun(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage

    def nearly_full(path: Any) -> Any:
        full = (tmp_path / "run/checkpoint-2").exists()
        return SimpleNamespace(free=1000) if full else real(path)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    monkeypatch.setattr(
        Path, "mkdir", lambda self, *a, _mkdir=Path.mkdir, **k: _mkdir(_not_checkpoint_4(self), *a, **k)
    )
    with pytest.raises(
        UserError, match=r"no space left for checkpoint-4 in .* about \d\.\d MiB, 0\.0 MiB are free; .*--resume"
    ):
        finetune(settings(place, tmp_path / "run"))


def _not_checkpoint_4(path: Path) -> Path:
    assert "checkpoint-4" not in path.name, "the save was begun"
    return path


def test_the_estimate_covers_a_checkpoint(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(
        "lemo.training.trainer.require_space", lambda directory, needed, what: asked.append((needed, what))
    )
    finetune(settings(place, tmp_path / "run"))
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint-4").iterdir())
    assert [what for _, what in asked] == ["checkpoint-2", "checkpoint-4"]
    assert asked[-1][0] >= written


def test_errors_that_are_not_the_disk_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), storage_errors("x", tmp_path, "remedy"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(UserError, match=r"^mine$"), storage_errors("x", tmp_path, "remedy"):
        raise UserError("mine")


def test_causes_are_searched(tmp_path: Path) -> None:
    error = RuntimeError("can't serialize")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UserError, match=r"^no space left while writing x in .*; remedy$"),
        storage_errors("x", tmp_path, "remedy"),
    ):
        raise error


def test_real_torch_errors_are_recognised(tmp_path: Path) -> None:
    """/dev/full fails every write as a full disk does."""
    with pytest.raises(UserError, match=r"^(no space left|the disk refused data)"), storage_errors("x", tmp_path, "r"):
        torch.save({"a": torch.zeros(1000)}, "/dev/full")


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(UserError, match="no space left for everything"):
        require_space(tmp_path, 2**62, "everything")


def test_failed_text_writes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
