"""`mode: auto`: the choice by the data, what the user is told, and what the run directory says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import lemo
from lemo.config import RunConfig, SparsityConfig
from lemo.config_io import load_config
from lemo.training import finetune
from lemo.training.auto import choose_sparsity
from tiny_run import run_settings, save_model, save_texts

AUTO = SparsityConfig(mode="auto")


@pytest.mark.parametrize(
    ("lengths", "labelled", "chosen"),
    [
        ([4096] * 4, 512, SparsityConfig(mode="backward")),
        ([4096] * 4, 4 * 4095, SparsityConfig(mode="dense")),
        ([65536], 65535, SparsityConfig(mode="dense")),
    ],
)
def test_choices(lengths: list[int], labelled: int, chosen: SparsityConfig) -> None:
    choice = choose_sparsity(AUTO, lengths, labelled)
    assert choice.sparsity == chosen
    assert choice.reason.startswith(f"mode {chosen.mode}")
    assert f"{labelled / sum(lengths):.0%} of the tokens have labels" in choice.reason


@pytest.mark.parametrize(("short", "hinted"), [(10, True), (40, False)])
def test_where_most_tokens_lie_in_long_sequences_attend_is_hinted_at(short: int, hinted: bool) -> None:
    choice = choose_sparsity(AUTO, [2048] * short + [65536], 4096)
    assert choice.sparsity == SparsityConfig(mode="backward")
    assert ("sparsity={attend: " in choice.reason) == hinted


def test_tile_mib_is_the_users() -> None:
    assert choose_sparsity(SparsityConfig(mode="auto", tile_mib=7), [100], 10).sparsity.tile_mib == 7


def test_auto_is_what_finetune_does_and_refuses_other_knobs() -> None:
    assert RunConfig().sparsity.mode == "auto"
    assert RunConfig.model_validate({"sparsity": {"fidelity": 0.9}}).sparsity.mode == "backward"
    with pytest.raises(ValidationError, match="mode auto chooses by itself; leave fidelity, keep out or name a mode"):
        SparsityConfig(mode="auto", keep=0.5, fidelity=0.9)


@pytest.mark.parametrize(("completion", "mode"), [(20, "backward"), (0, "dense")])
def test_a_run_says_and_stores_what_was_chosen(
    completion: int, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    save_texts(tmp_path / "data")
    changes = (f"data.completion_tokens={completion}", "training.steps=2")
    settings = run_settings(tmp_path / "model", tmp_path / "data", tmp_path / "run", *changes)
    settings = settings.model_copy(update={"sparsity": AUTO})
    summary = finetune(settings)
    assert f"mode {mode}: " in capsys.readouterr().err
    assert summary.mode == mode
    assert load_config(tmp_path / "run" / "config.yaml").sparsity.mode == mode
    assert finetune(settings, resume=True).loss_after == summary.loss_after


def test_sparsify_has_no_data_to_choose_by() -> None:
    with pytest.raises(ValueError, match="mode auto needs the data"):
        lemo.sparsify(object(), AUTO)
