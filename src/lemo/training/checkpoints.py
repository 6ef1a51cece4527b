"""Checkpoints that are whole or absent: written aside, hashed, flushed, renamed. Imports no torch.

`checkpoint-N/lemo.json` is written last. It lists every file's size and SHA-256, and the run's *identity*: the
settings that decide its result, and fingerprints of the model and of the data. Resuming checks both.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lemo.config import RunConfig
from lemo.config_io import CALIBRATION_FACTS
from lemo.errors import UserError
from lemo.training.storage import sync_directory, sync_file, write_json

MANIFEST = "lemo.json"
PREFIX = "checkpoint-"
ASIDE = ".tmp-checkpoint-"
# Settings that change what is shown or stored, not what is learned; model, data and calibration count by their
# fingerprints, so that they may move.
_FREE = {
    "output", "device", "evaluation", "data", "model.name", "training.save_every", "training.keep_checkpoints",
    "sparsity.calibration",
}  # fmt: skip
_MODEL, _DATA, _CALIBRATION = "model weights", "training data", "calibration"


def identity(config: RunConfig, model: str, data: str, processes: int) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoint.

    Args:
        config: resolved.
        model, data: fingerprints.
        processes: ranks that train together.
    """
    settings = dict(_flatten(config.model_dump(mode="json")))
    kept = {key: value for key, value in settings.items() if not _is_free(key)}
    calibration = {} if config.sparsity.calibration is None else {_CALIBRATION: _facts_of(config.sparsity.calibration)}
    return kept | {_MODEL: model, _DATA: data, "processes": processes} | calibration


def _facts_of(directory: str) -> str | None:
    """Hash of a calibration's facts; None where there are none, which `sparsify` refuses with its reason."""
    path = Path(directory) / CALIBRATION_FACTS
    return _sha256(path) if path.is_file() else None


def _is_free(key: str) -> bool:
    return key in _FREE or key.split(".")[0] in _FREE


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def aside_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return run / f"{ASIDE}{step}"


def seal(directory: Path, step: int, run_identity: Mapping[str, Any]) -> None:
    """Flushes a checkpoint's files to the disk and writes its manifest."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync_file(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(directory / MANIFEST, {"step": step, "identity": dict(run_identity), "files": files})


def publish(aside: Path, run: Path, step: int) -> Path:
    """Renames a sealed checkpoint into place; from here on it exists."""
    final = run / f"{PREFIX}{step}"
    (aside / final.name).rename(final)
    sync_directory(run)
    aside.rmdir()
    return final


def rotate(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints; each is renamed first, so a kill leaves none half deleted."""
    for directory in steps_of(run)[:-keep]:
        doomed = run / f"{ASIDE}{directory.name}"
        directory.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(run: Path) -> None:
    """Deletes what a kill in the middle of a save has left."""
    for directory in run.glob(f"{ASIDE}*"):
        shutil.rmtree(directory)


def steps_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest step first."""
    found = [path for path in run.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest(run: Path) -> Path:
    """The newest checkpoint, checked file by file.

    Raises:
        UserError: there is none, or it's damaged.
    """
    if not run.is_dir():
        raise UserError(f"--resume: there is no run in {run}; leave --resume out to start one")
    found = steps_of(run)
    if not found:
        raise UserError(
            f"--resume: {run} holds no checkpoint (training.save_every decides when they are written); "
            "leave --resume out and choose another --output to start anew"
        )
    fault = _fault(found[-1])
    if fault is not None:
        older = f"to fall back to {found[-2].name}" if len(found) > 1 else "and start anew with another --output"
        raise UserError(f"--resume: {fault}; delete {found[-1]} {older}")
    return found[-1]


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    manifest = checkpoint / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files, step = dict(content["files"]), content["step"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        dict(content["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{manifest} is missing or damaged"
    if step != step_of(checkpoint):
        return f"{checkpoint} holds the checkpoint of step {step}"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{path} is damaged"
    return None


def check_identity(checkpoint: Path, run_identity: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another run.

    Raises:
        UserError: settings, model, data or number of processes differ.
    """
    stored = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["identity"]
    current = json.loads(json.dumps(run_identity))
    different = [key for key in {**stored, **current} if stored.get(key) != current.get(key)]
    if different:
        shown = "; ".join(_difference(key, stored.get(key), current.get(key)) for key in different[:4])
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise UserError(
            f"--resume: {checkpoint} belongs to another run ({shown}{more}); "
            "give the settings it was started with, or leave --resume out and choose another --output"
        )


def _difference(key: str, stored: Any, current: Any) -> str:
    if key in (_MODEL, _DATA):
        return f"the {key} differ"
    return f"{key} was {stored!r}, now {current!r}"


def resume_hint(output: str) -> str:
    """What to tell somebody who interrupted a run."""
    found = steps_of(Path(output))
    if not found:
        return f"interrupted; no checkpoint in {output} yet, so delete it or choose another --output to start anew"
    return f"interrupted; go on from {found[-1].name} with: lemo finetune --resume --output {output}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
