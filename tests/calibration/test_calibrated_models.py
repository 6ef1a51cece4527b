"""What a calibration does once it is made: models and training runs take it up, and refuse one that doesn't fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import FAMILIES, load

import lemo
from lemo.config import BranchSelection
from lemo.config_io import load_config
from lemo.errors import UserError
from lemo.models import get_runtime, sparse_evaluation
from lemo.models.calibration import FACTS_FILE, TENSORS_FILE, read_calibration
from lemo.training import finetune
from lemo.training.metrics import MetricsLog


@pytest.mark.parametrize("family", FAMILIES)
def test_finetune_takes_it_up(family: str, place: Any, tmp_path: Path) -> None:
    settings = load_config(
        None,
        data=str(place.texts),
        model=str(place.model(family)),
        output=str(tmp_path / "run"),
        overrides=[
            "device=cpu",
            "data.max_tokens=512",
            "data.heldout_share=0.2",
            "sparsity.mode=forward",
            f"sparsity.calibration={place.calibration(family)}",
            "training.steps=8",
            "training.learning_rate=5e-3",
            "training.save_every=0",
            "evaluation.documents=4",
            "evaluation.sample_tokens=0",
        ],
    )
    summary = finetune(settings)
    assert summary.keep_mean == pytest.approx(0.75, abs=0.08)
    keeps = [line["keep_mean"] for line in MetricsLog(tmp_path / "run").read()]
    assert keeps[:4] == [1.0] * 4
    assert all(keep < 0.8 for keep in keeps[4:])
    assert summary.loss_after < summary.loss_before
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_resumes_with_its_calibration_only(place: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place.calibration("llama"), moved)
    overrides = [
        "device=cpu",
        "data.max_tokens=512",
        "data.heldout_share=0.2",
        "sparsity.mode=forward",
        f"sparsity.calibration={place.calibration('llama')}",
        "training.steps=2",
        "training.save_every=2",
        "evaluation.documents=0",
    ]

    def settings(*more: str) -> Any:
        places = {"data": str(place.texts), "model": str(place.model("llama")), "output": str(tmp_path / "run")}
        return load_config(None, **places, overrides=[*overrides, *more])

    finetune(settings())
    finetune(settings(f"sparsity.calibration={moved}"), resume=True)
    _edit(moved, seconds=1.5)
    with pytest.raises(UserError, match="calibration"):
        finetune(settings(f"sparsity.calibration={moved}"), resume=True)


@pytest.mark.parametrize("trains", [True, False])
def test_bypasses_and_thresholds_resume_where_they_were(trains: bool, place: Any, tmp_path: Path) -> None:
    overrides = [
        "device=cpu",
        "data.max_tokens=512",
        "data.heldout_share=0.2",
        "sparsity.mode=forward",
        f"sparsity.train_bypass={trains}",
        "sparsity.dense_share=0",
        f"sparsity.calibration={place.calibration('llama')}",
        "training.learning_rate=5e-3",
        "training.scheduler=constant",
        "training.steps=4",
        "training.save_every=2",
        "evaluation.documents=0",
    ]

    def settings(name: str) -> Any:
        places = {"data": str(place.texts), "model": str(place.model("llama")), "output": str(tmp_path / name)}
        return load_config(None, **places, overrides=overrides)

    finetune(settings("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    finetune(settings("parts"), resume=True)
    whole, parts = (
        load_file(tmp_path / name / "checkpoint-4" / "lemo_forward.safetensors") for name in ("whole", "parts")
    )
    calibration = read_calibration(place.calibration("llama"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    bypasses = {key: f"{key[0]}.{key[1]}.bypass.a" for key in calibration.bypasses}
    assert bool(set(bypasses.values()) & whole.keys()) is trains
    moved = []
    for (layer, branch), name in bypasses.items():
        used = calibration.facts.branches[branch].thresholds[layer] > 0
        assert not trains or torch.equal(whole[name], calibration.bypasses[layer, branch].a) != used
        follows = used and calibration.facts.branches[branch].keep[layer] < 1
        assert (f"{layer}.{branch}.threshold" in whole) is follows
        if follows:
            moved.append(float(whole[f"{layer}.{branch}.threshold"][1]) != 0)
    # One may keep exactly what it should.
    assert len(moved) > 2
    assert sum(moved) >= len(moved) - 1
    adapter = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)


def ids_of(place: Any) -> torch.Tensor:
    text = sorted(place.texts.iterdir())[0].read_bytes()
    return torch.tensor([list(text)]) % 200


def test_a_model_takes_thresholds_predictors_and_bypasses(place: Any) -> None:
    directory = place.calibration("llama")
    facts = read_calibration(directory).facts
    model = lemo.sparsify(load(place), lemo.SparsityConfig(mode="forward", calibration=str(directory)))
    runtime = get_runtime(model)
    assert runtime is not None
    assert runtime.config.block_size == facts.block_size == 16
    assert (runtime.config.dense_share, runtime.config.train_bypass) == (facts.dense_share, True) == (0.5, True)
    assert runtime.config.attention == BranchSelection(threshold=tuple(facts.branches["attention"].thresholds))
    assert len(runtime.predictors) == len(runtime.bypasses) == 8
    ids = ids_of(place)
    with torch.no_grad():
        model.eval()
        dense = model(input_ids=ids).logits
        with sparse_evaluation(model):
            sparse = model(input_ids=ids).logits
        assert any(plan.keep < 1 for plan in runtime.last_plans.values())
        assert not torch.equal(dense, sparse)
    lemo.restore(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_thresholds_follow_while_the_model_trains(place: Any) -> None:
    """Halved or doubled scores would move what is kept for good."""
    directory = place.calibration("llama")
    facts = read_calibration(directory).facts
    ids = ids_of(place)
    model = lemo.sparsify(
        load(place),
        lemo.SparsityConfig(mode="forward", calibration=str(directory), dense_share=0.0, train_bypass=False),
    )
    runtime = get_runtime(model)
    assert runtime is not None
    assert runtime.following is not None
    for key in runtime.following.calibrated:
        runtime.following.scales[key] = 0.7
    runtime.take_thresholds()

    def away() -> float:
        found = [(plan.keep, facts.branches[b].keep[i]) for (i, b), plan in runtime.last_plans.items()]
        return sum(keep - wanted for keep, wanted in found) / len(found)

    model.train()
    model(input_ids=ids)
    far = away()
    assert far < -0.05
    for _ in range(60):
        model(input_ids=ids)
        runtime.move_thresholds("cpu")
    assert abs(away()) < abs(far) / 3
    before, config = dict(runtime.following.scales), runtime.config
    with torch.no_grad(), sparse_evaluation(model.eval()):
        model(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    runtime.move_thresholds("cpu")
    assert (runtime.following.scales, runtime.config) == (before, config)


def test_what_the_caller_says_goes_before_the_defaults(place: Any) -> None:
    calibration = str(place.calibration("llama"))
    said = lemo.SparsityConfig(mode="forward", calibration=calibration, dense_share=0.0, train_bypass=False)
    runtime = get_runtime(lemo.sparsify(load(place), said))
    assert runtime is not None
    assert (runtime.config.dense_share, runtime.config.train_bypass) == (0.0, False)
    own_keep = lemo.SparsityConfig(mode="forward", calibration=calibration, keep=0.5)
    runtime = get_runtime(lemo.sparsify(load(place), own_keep))
    assert runtime is not None
    assert not runtime.config.dense_share
    assert runtime.following is None


def test_keep_goes_before_the_thresholds(place: Any) -> None:
    config = lemo.SparsityConfig(mode="forward", calibration=str(place.calibration("llama")), keep=0.5)
    model = lemo.sparsify(load(place), config)
    runtime = get_runtime(model)
    assert runtime is not None
    with torch.no_grad(), sparse_evaluation(model.eval()):
        model(input_ids=ids_of(place))
    assert all(plan.keep == pytest.approx(0.5, abs=0.05) for plan in runtime.last_plans.values())


def test_predicted_plans_are_the_exact_ones_but_for_some_blocks(place: Any) -> None:
    plans = []
    for calibration in (str(place.calibration("llama")), None):
        config = lemo.SparsityConfig(mode="forward", calibration=calibration, keep=0.5, block_size=16)
        model = lemo.sparsify(load(place), config)
        runtime = get_runtime(model)
        assert runtime is not None
        with torch.no_grad(), sparse_evaluation(model.eval()):
            model(input_ids=ids_of(place))
        plans.append({tuple(key): set(plan.rows.tolist()) for key, plan in runtime.last_plans.items()})
    first = plans[0][0, "attention"] & plans[1][0, "attention"]
    # Random ones would share half.
    assert len(first) >= 0.7 * len(plans[1][0, "attention"])


def refused(place: Any, directory: Path, match: str, model: Any = None, **sparsity: Any) -> None:
    config = lemo.SparsityConfig(mode="forward", calibration=str(directory), **sparsity)
    with pytest.raises(ValueError, match=match):
        lemo.sparsify(load(place) if model is None else model, config)


def test_what_doesnt_fit_is_refused(place: Any, tmp_path: Path) -> None:
    good = place.calibration("llama")
    refused(place, good, "another model", model=load(place, "qwen2"))
    other = load(place)
    with torch.no_grad():
        other.model.layers[2].input_layernorm.weight[3] += 0.1
    refused(place, good, "another model", model=other)
    refused(place, good, "calibrated in float32, this model is in bfloat16", model=load(place, dtype=torch.bfloat16))
    refused(place, good, "block_size is 64", block_size=64)
    refused(place, good, "score is causal", score="causal")
    causal = tmp_path / "causal"
    shutil.copytree(good, causal)
    _edit(causal, score="causal")
    refused(place, causal, r"need thresholds: a keep \(top-k\) looks ahead", keep=0.5)
    runtime = get_runtime(lemo.sparsify(load(place), lemo.SparsityConfig(mode="forward", calibration=str(causal))))
    assert runtime is not None
    assert runtime.config.score == "causal"
    refused(place, tmp_path / "nowhere", "holds no calibration.json")
    for name, damage in {
        "format": lambda d: _edit(d, format=99),
        "field": lambda d: _edit(d, block_size="x"),
        "json": lambda d: (d / FACTS_FILE).write_text("{"),
        "no tensors": lambda d: (d / TENSORS_FILE).unlink(),
        "cut": lambda d: (d / TENSORS_FILE).write_bytes((d / TENSORS_FILE).read_bytes()[:200]),
        "missing": lambda d: save_file(dict(list(load_file(d / TENSORS_FILE).items())[5:]), d / TENSORS_FILE),
    }.items():
        copy = tmp_path / name
        shutil.copytree(good, copy)
        damage(copy)
        refused(place, copy, "format 99" if name == "format" else "damaged")


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / FACTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_same_model_with_lora_is_the_same_model(place: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(place), LoraConfig(r=2, target_modules="all-linear"))
    lemo.sparsify(model, lemo.SparsityConfig(mode="forward", calibration=str(place.calibration("llama"))))
