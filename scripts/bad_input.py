"""Drives what a user can get wrong through the real command line, and checks how it's answered.

    python scripts/bad_input.py [name ...]

Each case must end with exit status 2 and one line `error: …` that says what to do, without a traceback, and leave every
file as it was. Cases that need no torch run as `python -m lemo`; the others run the same entry point in a process that
is forked from one where torch has been imported, which saves seconds a case.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from bad_input_cases import Case, cases  # noqa: E402  # after the path to its helpers


def check(case: Case, root: Path) -> None:
    """Runs a case.

    Raises:
        AssertionError: it was answered otherwise than promised.
    """
    case.prepare(root)
    before = snapshot(root)
    arguments = case.arguments.format(root=root).split()
    status, out, err = (run_light if case.light else run_forked)(arguments, case.file_limit)
    last = err.strip().splitlines()[-1] if err.strip() else ""
    shown = f"\n--- status {status}, stderr ends with:\n" + "\n".join(err.splitlines()[-12:])
    assert status == 2, f"exit status {status}, not 2{shown}"
    assert "Traceback" not in err + out, f"a traceback{shown}"
    assert last.startswith("error: "), f"the last line isn't the error{shown}"
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, f"more than one error line{shown}"
    assert re.search(case.message, last), f"the message doesn't match {case.message!r}{shown}"
    assert out == "", f"printed on stdout: {out[:200]!r}"
    after = snapshot(root)
    # A failed resume may drop metrics of steps that it was about to repeat.
    lost = [name for name in before if after.get(name) != before[name] and not name.endswith("full/metrics.jsonl")]
    assert not lost, f"changed or lost: {lost}{shown}"
    if case.file_limit is None:
        assert after.keys() == before.keys(), f"left behind: {sorted(after.keys() - before.keys())}"
    case.afterwards(root)


def snapshot(root: Path) -> dict[str, str]:
    """Every file's hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def run_light(arguments: list[str], file_limit: int | None) -> tuple[int, str, str]:
    """`python -m lemo …` as a user runs it."""
    assert file_limit is None
    done = subprocess.run([sys.executable, "-m", "lemo", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def run_forked(arguments: list[str], file_limit: int | None) -> tuple[int, str, str]:
    """The same entry point in a process forked from one that has imported torch."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lemo.training.job", "lemo.evaluation.job"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "out"), Path(folder, "err")]
        process = context.Process(target=_enter, args=(arguments, files, file_limit))
        process.start()
        process.join(timeout=120)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, *(path.read_text() for path in files)


def _enter(arguments: list[str], files: list[Path], file_limit: int | None) -> None:
    for path, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["lemo", *arguments]
    from lemo.cli.main import run

    run()


def make_place(root: Path) -> None:
    """A model, texts, and a finished run with two checkpoints."""
    from lemo.training import finetune
    from tiny_run import run_settings, save_model, save_texts

    save_model(root / "model")
    save_texts(root / "texts")
    finetune(run_settings(root / "model", root / "texts", root / "run"))


def main(names: list[str]) -> int:
    """Runs the named cases, or all; returns how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        make_place(root)
        for case in cases():
            if names and case.name not in names:
                continue
            started = time.perf_counter()
            try:
                check(case, root)
                verdict = "ok"
            except AssertionError as error:
                failed += 1
                verdict = f"FAILED: {error}"
            print(f"{case.name:40} {time.perf_counter() - started:5.1f} s  {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
