"""Drives what a user can get wrong through the real command line, and checks how it's answered.

    python scripts/bad_input.py [name ...]

Each case must end with exit status 2 and one line `error: …` that says what to do, without a traceback, and leave every
file as it was. Cases that need no torch run as `python -m lemo`; the others run the same entry point in a process that
is forked from one where torch has been imported, which saves seconds a case.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

FILE_LIMIT = 12 * 1024  # bytes a file; the tiny adapter fits, its optimizer state doesn't


@dataclass
class Case:
    """One mistake.

    Attributes:
        name: of the case.
        arguments: of the command line; {root} is the place where the run's files are.
        message: regular expression that the error line must match.
        light: whether it must fail before torch is imported, and so runs as `python -m lemo`.
        prepare: makes the mistake's files in the place, before the state of the files is noted.
        file_limit: largest file that can be written (bytes), as on a full disk.
        afterwards: further checks.
    """

    name: str
    arguments: str
    message: str
    light: bool = False
    prepare: Callable[[Path], None] = field(default=lambda root: None)
    file_limit: int | None = None
    afterwards: Callable[[Path], None] = field(default=lambda root: None)


def quick(*overrides: str) -> str:
    from tiny_run import QUICK

    return " ".join(f"--set {override}" for override in (*QUICK, *overrides))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def prepare(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def copy_run(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A copy of the finished run in `broken`, changed."""

    def prepare(root: Path) -> None:
        shutil.copytree(root / "run", root / "broken", dirs_exist_ok=True)
        change(root / "broken")

    return prepare


def flip(name: str) -> Callable[[Path], None]:
    """Changes one bit in the middle of a file."""

    def change(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Cuts a file in half."""

    def change(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return change


def foreign_architecture(root: Path) -> None:
    shutil.copytree(root / "model", root / "gpt2", dirs_exist_ok=True)
    config = json.loads((root / "gpt2/config.json").read_text()) | {"model_type": "gpt2"}
    (root / "gpt2/config.json").write_text(json.dumps(config))


def other_model(root: Path) -> None:
    from tiny_run import save_model

    if not (root / "other").exists():
        save_model(root / "other", layers=3, seed=5)


def interrupted_run(root: Path) -> None:
    """A run killed in step 5, with checkpoints of steps 2 and 4."""
    from crash import killed_run

    from tiny_run import run_settings

    killed_run(run_settings(root / "model", root / "texts", root / "full"), "in a step", 5)


def nothing_lost_when_full(root: Path) -> None:
    names = sorted(path.name for path in (root / "full").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "config.yaml", "metrics.jsonl"], names


CONVERSATION = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
TUNE = "finetune --model {root}/model --data {root}/texts --output {root}/new"
DATA = "finetune --model {root}/model --output {root}/new"


def cases() -> list[Case]:
    broken = f"finetune --model {{root}}/model --data {{root}}/texts --output {{root}}/broken --resume {quick()}"
    return [
        Case(
            "unknown key in a file",
            "finetune --config {root}/key.yaml",
            r"key\.yaml: unknown key sparsity\.fidelty; did you mean sparsity\.fidelity\?",
            light=True,
            prepare=write("key.yaml", "sparsity: {fidelty: 0.9}\n"),
        ),
        Case("unknown key in --set", "finetune --set trainig.steps=3", r"did you mean training\?", light=True),
        Case("key of another section", "finetune --set steps=3", r"did you mean training\.steps\?", light=True),
        Case(
            "value out of range",
            "finetune --set sparsity.fidelity=1.5",
            r"sparsity\.fidelity = 1\.5: must be at most 1",
            light=True,
        ),
        Case(
            "value of the wrong kind",
            "finetune --set training.steps=many",
            r"training\.steps = 'many': must be a whole number",
            light=True,
        ),
        Case(
            "settings that exclude each other",
            "finetune --set sparsity.policy=segments --set sparsity.keep=0.5",
            r"policy segments sets its share by .*leave keep out",
            light=True,
        ),
        Case("configuration file that isn't there", "finetune --config {root}/none.yaml", r"no such file", light=True),
        Case(
            "malformed YAML",
            "finetune --config {root}/bad.yaml",
            r"bad\.yaml:2: not valid YAML",
            light=True,
            prepare=write("bad.yaml", "data:\n\ttrain: x\n"),
        ),
        Case("unknown option", "finetune --fidelity 0.9", r"No such option: --fidelity", light=True),
        Case("unknown command", "finetun", r"No such command 'finetun'", light=True),
        Case("missing data", f"{DATA} --data {{root}}/txts {quick()}", r"txts does not exist \(did you mean .*texts"),
        Case(
            "empty folder",
            f"{DATA} --data {{root}}/nothing {quick()}",
            r"the folder .*nothing holds no files; give",
            prepare=lambda root: (root / "nothing").mkdir(exist_ok=True),
        ),
        Case(
            "malformed JSONL",
            f"{DATA} --data {{root}}/bad.jsonl {quick()}",
            r"bad\.jsonl:2: not valid JSON .* one complete JSON object on each line",
            prepare=write("bad.jsonl", '{"text": "fine"}\n{"text": \n'),
        ),
        Case(
            "conversation without labels",
            f"{DATA} --data {{root}}/chat.jsonl {quick()}",
            r"chat\.jsonl:1: no message has role assistant .* add the assistant's answer or remove the line",
            prepare=write("chat.jsonl", f"{CONVERSATION}\n"),
        ),
        Case(
            "document longer than the limit",
            f"{TUNE} {quick('data.max_tokens=100')}",
            r"tokens.*data\.max_tokens.*overflow",
        ),
        Case(
            "limit longer than the model",
            f"{TUNE} {quick('data.max_tokens=1000')}",
            r"data\.max_tokens is 1,000, but .*model has 256 positions; set data\.max_tokens to at most 256",
        ),
        Case(
            "labels over keep",
            f"{TUNE} {quick('sparsity.keep=0.2', 'data.completion_tokens=0')}",
            r"blocks hold labels, but sparsity\.keep=0\.2 allows .*sparsity\.policy=segments",
        ),
        Case(
            "LoRA on modules that don't exist",
            f"{TUNE} {quick('lora.targets=[query]')}",
            r"lora\.targets \('query',\).*linears are .*q_proj",
        ),
        Case(
            "output in use",
            f"finetune --model {{root}}/model --data {{root}}/texts --output {{root}}/run {quick()}",
            r"run is not empty, and nothing is overwritten; add --resume .*choose another --output",
        ),
        Case(
            "output is a file",
            f"finetune --model {{root}}/model --data {{root}}/texts --output {{root}}/model/config.json {quick()}",
            r"config\.json is a file; choose another --output",
        ),
        Case("missing model", f"{DATA.replace('/model', '/modl')} {quick()}", r"modl.*check model\.name"),
        Case(
            "unknown architecture",
            f"finetune --model {{root}}/gpt2 --data {{root}}/texts --output {{root}}/new {quick()}",
            r"gpt2.*llama.*mistral.*opt.*qwen3",
            prepare=foreign_architecture,
        ),
        Case("missing checkpoint", f"{TUNE} --resume {quick()}", r"--resume: there is no run in .*new"),
        Case(
            "corrupt checkpoint",
            broken,
            r"checkpoint-6/optimizer\.pt is damaged; delete .*checkpoint-6 to fall back to checkpoint-4",
            prepare=copy_run(flip("checkpoint-6/optimizer.pt")),
        ),
        Case(
            "foreign checkpoint",
            f"finetune --model {{root}}/other --data {{root}}/texts --output {{root}}/run --resume {quick()}",
            r"checkpoint-6 belongs to another run \(the model weights differ\)",
            prepare=other_model,
        ),
        Case(
            "checkpoint of other settings",
            f"finetune --output {{root}}/run --resume {quick('training.seed=3')}",
            r"belongs to another run \(training\.seed was 0, now 3",
        ),
        Case("missing adapter", f"eval {_eval('model', 'none')}", r"there is no adapter directory .*none"),
        Case(
            "corrupt adapter",
            f"eval {_eval('model', 'broken/adapter')}",
            r"adapter_model\.safetensors is damaged",
            prepare=copy_run(cut("adapter/adapter_model.safetensors")),
        ),
        Case(
            "foreign adapter",
            f"eval {_eval('other', 'run/adapter')}",
            r"trained on .*model, this model is .*other",
            prepare=other_model,
        ),
        Case(
            "evaluation over a file",
            f"eval {_eval('model', 'run/adapter')} --output {{root}}/run/summary.json",
            r"summary\.json exists, and nothing is overwritten",
        ),
        Case(
            "no space left for a checkpoint",
            f"finetune --output {{root}}/full --resume {quick()}",
            r"while writing checkpoint-6 in .*full; earlier checkpoints are intact: free some space.*--resume",
            prepare=interrupted_run,
            file_limit=FILE_LIMIT,
            afterwards=nothing_lost_when_full,
        ),
        Case("report of no run", "report {root}/texts", r"texts"),
    ]


def _eval(model: str, adapter: str) -> str:
    return f"--model {{root}}/{model} --adapter {{root}}/{adapter} --data {{root}}/texts {quick()}"


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
