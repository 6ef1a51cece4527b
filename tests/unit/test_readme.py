"""The pages say what is true: commands and flags exist, settings parse, examples run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

import lemo
from lemo.bench.config import load_quality
from lemo.calibration.config import load_calibration
from lemo.cli.main import app
from lemo.config import RunConfig
from lemo.config_io import load_config
from lemo.models.architectures import supported
from tiny_run import save_model, save_texts

ROOT = Path(__file__).parents[2]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for kind, body in FENCE.findall(text) if kind == language]


def commands(page: str) -> list[list[str]]:
    """Every `lemo SUBCOMMAND ...` in a page's code, split into words; a trailing backslash joins lines."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    shell = [line for _, body in FENCE.findall(text) for line in body.splitlines()]
    lines = shell + re.findall(r"`(lemo [^`\n]+)`", FENCE.sub("", text))
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"\s*lemo [a-z]", line)]


def test_the_readme_shows_every_command() -> None:
    command: Any = get_command(app)
    assert {words[0] for words in commands("README.md")} == set(command.commands)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page: str) -> None:
    for words in commands(page):
        if "|" in words:
            continue
        command: Any = get_command(app)
        while hasattr(command, "commands") and words:  # `bench` has commands of its own
            assert words[0] in command.commands, words
            command, words = command.commands[words[0]], words[1:]
        if not words:  # the bare name in a sentence
            continue
        # Parses as the command line would, without running anything.
        with command.make_context(command.name, words) as context:
            overrides = [o for o in context.params.get("overrides") or [] if o != "key=value"]
            if command.name == "quality":
                load_quality(ROOT / context.params["config"], overrides=overrides)
            elif command.name == "calibrate":
                load_calibration(None, overrides=overrides)
            else:
                load_config(overrides=overrides)


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_json_in_pages_are_valid(page: str, tmp_path: Path) -> None:
    for number, body in enumerate(fences(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(body)
        load_config(path)
    for body in fences(page, "json"):
        for line in body.splitlines():
            json.loads(line)


@pytest.mark.parametrize("page", PAGES)
def test_python_in_pages_names_what_exists(page: str) -> None:
    for body in fences(page, "python"):
        compile(body, page, "exec")
        for name in re.findall(r"\blemo\.(\w+)", body):
            assert hasattr(lemo, name), name
        for call in re.findall(r"lemo\.SparsityConfig\([^)]*\)", body):
            eval(call, {"lemo": lemo})


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_example_configurations_load_and_say_more_than_the_defaults(path: Path) -> None:
    config = load_config(path)
    assert config != RunConfig()
    # Its first comment gives the command.
    assert f"lemo finetune --config examples/{path.name}" in path.read_text().splitlines()[0]
    assert set(yaml.safe_load(path.read_text())) <= set(RunConfig.model_fields)


def test_the_readme_names_the_architectures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("Architectures:")).lower()
    assert all(name in line for name in supported())


def run_example(name: str, *arguments: str) -> None:
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        sys.argv = before


def loads_as_stock_adapter(model: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    moved = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert moved
    assert any(p.abs().max() > 0 for p in moved), "the adapter was not trained"


def test_the_trainer_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts, output = save_model(tmp_path / "model"), save_texts(tmp_path / "texts"), tmp_path / "run"
    files = [str(path) for path in sorted(texts.glob("*.txt"))]
    options = [
        "--model",
        str(model),
        "--output",
        str(output),
        "--steps",
        "2",
        "--labelled",
        "16",
        "--max-tokens",
        "128",
    ]
    run_example("finetune_peft_trainer.py", *options, *files)
    assert "kept " in capsys.readouterr().out
    loads_as_stock_adapter(model, output / "adapter")


def test_the_trl_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    model, output, data = save_model(tmp_path / "model"), tmp_path / "run", tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} prompt " * 9, "completion": f" answer {i}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", str(model), "--output", str(output), "--steps", "2", "--max-tokens", "160"]
    run_example("finetune_trl.py", *options, str(data))
    assert "kept " in capsys.readouterr().out
    loads_as_stock_adapter(model, output / "adapter")


def test_a_flag_that_does_not_exist_is_noticed() -> None:
    command: Any = get_command(app)
    with pytest.raises(typer.BadParameter.__bases__[0]):
        command.commands["eval"].make_context("eval", ["--no-such-flag"])
