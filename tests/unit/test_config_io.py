"""Configuration files, `--set`, and the messages a mistake gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lemo.config import RopeScaling, RunConfig, SparsityConfig
from lemo.config_io import known_keys, load_config, save_resolved
from lemo.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_without_anything_the_packaged_job_is_loaded() -> None:
    config = load_config()
    assert config.data.train == "stdlib"
    assert config.data.completion_tokens == 512
    assert config.training != RunConfig().training


def test_data_or_config_start_from_plain_defaults(tmp_path: Path) -> None:
    assert load_config(data="texts") == RunConfig.model_validate({"data": {"train": "texts"}})
    assert load_config(write(tmp_path, "")) == RunConfig()


def test_flags_win_over_the_file_and_set_over_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: a}\ndata: {train: b, max_tokens: 100}\noutput: c\n")
    config = load_config(path, model="m", output="o", data="d", overrides=["output=z", "lora.r=4"])
    assert (config.model.name, config.data.train, config.data.max_tokens) == ("m", "d", 100)
    assert (config.output, config.lora.r) == ("z", 4)


def test_set_takes_yaml_values() -> None:
    config = load_config(
        data="x",
        overrides=[
            "lora.targets=[q_proj, v_proj]",
            "training.learning_rate=1e-3",
            "training.gradient_checkpointing=false",
            "data.heldout=null",
            "sparsity.segments.spans=8",
            "sparsity.policy=segments",
            "model.rope_scaling.rope_type=yarn",
            "model.rope_scaling.factor=4",
        ],
    )
    assert config.model.rope_scaling == RopeScaling(rope_type="yarn", factor=4.0)
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.training.learning_rate == 1e-3
    assert config.training.gradient_checkpointing is False
    assert config.data.heldout is None
    assert config.sparsity.segments.spans == 8


def test_resuming_starts_from_the_saved_configuration(tmp_path: Path) -> None:
    config = load_config(data="x", output=str(tmp_path), overrides=["training.steps=7"])
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(output=str(tmp_path), resume=True) == config
    assert load_config(overrides=[f"output={tmp_path}"], resume=True) == config
    changed = load_config(output=str(tmp_path), overrides=["training.steps=9"], resume=True)
    assert changed == config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})
    # A run that was moved resumes where it is.
    (tmp_path / "moved").mkdir()
    (tmp_path / "config.yaml").rename(tmp_path / "moved/config.yaml")
    moved = load_config(output=str(tmp_path / "moved"), resume=True)
    assert moved == config.model_copy(update={"output": str(tmp_path / "moved")})
    # An explicit file wins.
    assert load_config(write(tmp_path, ""), output=str(tmp_path / "moved"), resume=True).training.steps == 100


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        data="x",
        overrides=["sparsity.mode=forward", "sparsity.attention={keep: [0.5, 1.0]}", "lora.targets=[q_proj]"],
    )
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: {mode: dense}", r"run\.yaml: unknown key sparsty; did you mean sparsity\?"),
        ("sparsity: {fidelty: 0.9}", r"unknown key sparsity\.fidelty; did you mean sparsity\.fidelity\?"),
        ("max_tokens: 100", r"unknown key max_tokens; did you mean data\.max_tokens\?"),
        ("sparsity: {zzz: 1}", r"unknown key sparsity\.zzz; sparsity has mode, block_size"),
        ("1: 2", r"unknown key 1"),
        ("model: {name: {x: 1}}", r"model\.name takes a single value, no keys such as 'x'"),
        ("- a", r"must hold sections of keys such as 'data:', not list"),
        ("a: [1", r"run\.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2", r"run\.yaml:2: not valid YAML"),
        ("sparsity: 5", r"run\.yaml: sparsity = 5: must be a section of keys"),
        ("sparsity: {fidelity: 1.5}", r"run\.yaml: sparsity\.fidelity = 1\.5: must be at most 1\.0"),
        ("sparsity: {mode: sparse}", r"sparsity\.mode = 'sparse': must be one of auto, backward, forward or dense"),
        ("training: {steps: 0}", r"training\.steps = 0: must be at least 1"),
        ("training: {steps: 1.5}", r"training\.steps = 1\.5: must be a whole number"),
        ("training: {steps: many}", r"training\.steps = 'many': must be a whole number"),
        ("training: {learning_rate: fast}", r"training\.learning_rate = 'fast': must be a number"),
        ("data: {packing: maybe}", r"data\.packing = 'maybe': must be true or false"),
        ("data: {train: 5}", r"data\.train = 5: must be text"),
        ("lora: {targets: some}", r"lora\.targets = 'some': must be one of all-linear or must be a list"),
        (
            "data: {completion_tokens: 5000}",
            r"run\.yaml: data: completion_tokens must be smaller than max_tokens",
        ),
        ("sparsity: {mode: forward}", r"run\.yaml: sparsity: mode forward needs calibration, keep"),
        ("sparsity: {policy: random}", r"sparsity: policy random needs keep, the share"),
        ("sparsity: {policy: random, mode: dense, keep: 0.5}", r"policy random belongs to mode backward, not dense"),
        ("sparsity: {mode: dense, keep: 0.3, fidelity: 0.9}", r"mode dense doesn't use fidelity, keep; leave it out"),
        ("sparsity: {mode: forward, keep: 0.5, labelled: ranked}", r"mode forward doesn't use labelled"),
        ("sparsity: {segments: {spans: 8, drawn: 2}}", r"policy energy doesn't use segments; leave it out or choose"),
        ("sparsity: {policy: segments, fidelity: 0.9}", r"policy segments doesn't use fidelity"),
        ("sparsity: {mode: dense, attend: {look: 0.5}}", r"look is for choice sampled; leave it out"),
        ("sparsity: {score: causal}", r"policy energy doesn't use score"),
        ("sparsity: {fidelity: 0, labelled: ranked}", r"fidelity 0 keeps labelled blocks alone, so labelled can't be"),
        ("model: {rope_scaling: {rope_type: yarn, factor: 1}}", r"rope_scaling\.factor = 1: must be greater than 1"),
        ("model: {rope_scaling: {rope_type: dynamic, factor: 2}}", r"'dynamic': must be one of linear or yarn"),
        ("model: {rope_scaling: {rope_type: yarn, factr: 2}}", r"did you mean model\.rope_scaling\.factor\?"),
        ("model: {rope_scaling: 4}", r"model\.rope_scaling = 4: must be a section of keys"),
        (
            "training: {steps: 0}\nlora: {r: 0}",
            r"lora\.r = 0: must be at least 1; \S*run\.yaml: training\.steps = 0: must be at least 1",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_config(write(tmp_path, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sparsity.fidelity=-1",
            r"^--set sparsity\.fidelity=-1: sparsity\.fidelity = -1: must be at least 0",
        ),
        ("sparsity.keep", r"^--set sparsity\.keep: write key=value"),
        ("=3", r"^--set =3: write key=value"),
        ("sparsity.fidelty=0.5", r"unknown key sparsity\.fidelty; did you mean sparsity\.fidelity\?"),
        ("fidelity=0.5", r"unknown key fidelity; did you mean sparsity\.fidelity\?"),
        ("output.name=x", r"output takes a single value"),
        ("data.train=[a", r"the value is not valid YAML"),
        ("sparsity.mode=forward", r"^--set sparsity\.mode=forward: sparsity: mode forward needs calibration, keep"),
    ],
)
def test_mistakes_in_set(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(overrides=[override])


def test_set_below_a_scalar_of_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "sparsity: 5")
    with pytest.raises(UserError, match=r"--set sparsity\.keep=0\.5: sparsity is 5, which has no keys"):
        load_config(path, overrides=["sparsity.keep=0.5"])


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; leave --config out"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="can't be read as UTF-8 text"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read as UTF-8 text"):
        load_config(tmp_path / "bytes.yaml")


def test_every_setting_is_known() -> None:
    keys = set(known_keys())
    assert {"sparsity.segments.drawn", "sparsity.attention.keep", "output", "training.seed"} <= keys


@pytest.mark.parametrize("arguments", [["--set", "sparsity.fidelty=0.9"], ["--config", "missing.yaml"]])
def test_configuration_errors_are_found_before_torch_is_imported(tmp_path: Path, arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from lemo.cli.main import run\n"
        "try:\n"
        "    run()\n"
        "except SystemExit as stop:\n"
        "    heavy = [name for name in ('torch', 'transformers', 'peft') if name in sys.modules]\n"
        "    print('status', stop.code, 'heavy', heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "finetune", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "status 2 heavy []", done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", ["backward", "dense", "auto"])
def test_configurations_saved_when_a_score_was_the_default_load(mode: str) -> None:
    assert SparsityConfig(mode=mode, score="paper").score == "paper"
