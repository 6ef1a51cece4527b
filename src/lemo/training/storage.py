"""Writing so that a crash, a kill or a full disk never leaves half a file where a whole one is expected."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lemo.errors import UserError

MIB = 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors write in C++ and Rust; their errors carry the reason as text only.
_FULL_TEXTS = ("No space left on device", "os error 28", "os error 122", "os error 27", "File too large")
_FAILED_TEXTS = ("PytorchStreamWriter failed", "unexpected pos")


def require_space(directory: Path, needed: int, what: str) -> None:
    """Refuses to start a write that can't fit.

    Args:
        directory: existing directory on the file system in question.
        needed: estimate, bytes.
        what: for the message.

    Raises:
        UserError: less is free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"no space left for {what} in {directory}: it needs about {needed / MIB:.1f} MiB, {free / MIB:.1f} MiB are "
            "free; free some space, then go on with --resume"
        )


@contextmanager
def storage_errors(what: str, directory: Path, remedy: str) -> Iterator[None]:
    """Turns a failed write into a `UserError`; any other exception passes.

    Raises:
        UserError: no space left, quota exceeded, read-only or broken file system.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise UserError(f"{reason} while writing {what} in {directory}; {remedy}") from error


def _write_failure(error: BaseException | None) -> str | None:
    """Why a write failed, if the exception or one of its causes says that a write did."""
    seen: set[int] = set()
    found: str | None = None
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if (isinstance(error, OSError) and error.errno in _FULL) or any(part in text for part in _FULL_TEXTS):
            return "no space left"
        if isinstance(error, OSError) and error.errno is not None:
            found = f"{os.strerror(error.errno)} ({error.filename})" if error.filename else os.strerror(error.errno)
        elif any(part in text for part in _FAILED_TEXTS):
            found = "the disk refused data (is it full?)"
        error = error.__cause__ or error.__context__
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a file aside, flushes it to the disk, and renames it into place."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities, which JSON lacks, are refused.

    Raises:
        ValueError: the value holds one.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def sync_directory(path: Path) -> None:
    """Makes renames and new entries of a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes a file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
