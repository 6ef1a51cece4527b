"""The table of `bad_input.py`: each mistake, how to make it, and what must be answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
        Case(
            "random blocks without their share",
            "finetune --set sparsity.policy=random",
            r"policy random needs keep",
            light=True,
        ),
        Case(
            "context extended by an unknown rule",
            "finetune --set model.rope_scaling.rope_type=dynamic --set model.rope_scaling.factor=4",
            r"model\.rope_scaling\.rope_type = 'dynamic': must be one of linear or yarn",
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
        Case(
            "unknown key of a task",
            "bench quality --config {root}/task.yaml",
            r"task\.yaml: unknown key task\.lenghts; did you mean task\.lengths\?",
            light=True,
            prepare=write("task.yaml", "task: {kind: retrieval, lenghts: [1024]}\n"),
        ),
        Case("study without a file", "bench quality", r"Missing option '--config'", light=True),
        Case("study that isn't there", "bench quality --config {root}/none.yaml", r"no such file", light=True),
        Case(
            "labels-only where every token is labelled",
            "bench quality --config {root}/lm.yaml",
            r"labels-only leaves nothing out in task lm",
            light=True,
            prepare=write("lm.yaml", "task: {kind: lm}\nmethods: [{method: labels-only}]\n"),
        ),
        Case(
            "study over a run",
            "bench quality --config {root}/sft.yaml --output {root}/run",
            r"run is not empty, and nothing is overwritten; add --resume .*choose another --output",
            prepare=write("sft.yaml", "task: {kind: sft}\n"),
        ),
        Case(
            "resuming what is no study",
            "bench quality --config {root}/sft.yaml --output {root}/texts --resume",
            r"texts holds no study to resume; choose another --output",
            prepare=write("sft.yaml", "task: {kind: sft}\n"),
        ),
        Case(
            "task without text",
            "bench quality --config {root}/sft.yaml --model {root}/model --set task.sources=[{root}/txts]",
            r"txts does not exist",
            prepare=write("sft.yaml", "task: {kind: sft}\n"),
        ),
        Case("report of no run", "report {root}/texts", r"texts"),
        Case(
            "calibration with an unknown key",
            "calibrate --set predictor.width=3",
            r"did you mean predictor\.widths\?",
            light=True,
        ),
        Case(
            "calibration over a run",
            "calibrate --data {root}/texts --model {root}/model --output {root}/run",
            r"run is not empty, and nothing is overwritten; add --resume .*choose another --output",
        ),
        Case(
            "calibration of too short texts",
            "calibrate --data {root}/texts --model {root}/model --output {root}/new --set data.max_tokens=192",
            r"under four blocks of 64: .*lower block_size",
        ),
        Case(
            "a calibration that isn't there",
            f"{TUNE} {quick('sparsity.mode=forward', 'sparsity.calibration={root}/texts', 'sparsity.block_size=null')}",
            r"texts holds no calibration\.json; give the directory that `lemo calibrate --output` wrote",
        ),
        Case(
            "a calibration in another mode",
            "finetune --set sparsity.calibration=x",
            r"calibration and train_bypass belong to mode forward",
            light=True,
        ),
    ]


def _eval(model: str, adapter: str) -> str:
    return f"--model {{root}}/{model} --adapter {{root}}/{adapter} --data {{root}}/texts {quick()}"
