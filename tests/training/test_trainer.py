"""What LemoTrainer changes: the loss's normaliser, metrics, non-finite losses; and what `finetune` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemo.config import RunConfig
from lemo.config_io import load_config
from lemo.errors import UserError
from lemo.evaluation.job import evaluate_model
from lemo.models.loading import load_model
from lemo.training import finetune
from lemo.training.checks import check_labels_fit, check_length, fingerprint_model
from lemo.training.trainer import LemoTrainer, count_labels, count_tokens
from tiny_run import run_settings, save_model, save_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trainer")
    save_model(root / "model")
    save_texts(root / "data")
    return root


def settings(place: Path, output: Path, *overrides: str) -> RunConfig:
    return run_settings(place / "model", place / "data", output, *overrides)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_counts_leave_out_first_labels_and_padding() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert count_labels({"input_ids": ids, "labels": labels}) == 3
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 7
    assert count_tokens({"input_ids": ids}) == 8


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_loss_is_the_mean_over_the_labels_that_enter_it(place: Path, tmp_path: Path, packing: str) -> None:
    """Step 1 trains the base model's loss (LoRA starts at zero), so it must equal a plain mean computed apart."""
    seen: list[dict[str, torch.Tensor]] = []

    class Recorder(LemoTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lemo.training.job.LemoTrainer", Recorder)
        finetune(
            settings(
                place,
                tmp_path / "run",
                "training.steps=1",
                "training.accumulation=3",
                "data.completion_tokens=0",
                "data.max_tokens=250",
                f"data.packing={packing}",
            )
        )
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    total, count = 0.0, 0
    for batch in seen:
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        count += int((labels != -100).sum())
    (line,) = lines(tmp_path / "run")
    assert len(seen) == 3
    assert line["labelled_tokens"] == count
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)


def test_metrics_and_summary_agree(place: Path, tmp_path: Path) -> None:
    summary = finetune(settings(place, tmp_path / "run", "training.batch_size=2"))
    records = lines(tmp_path / "run")
    stored = json.loads((tmp_path / "run/summary.json").read_text())
    assert stored == json.loads(json.dumps(summary.to_dict()))
    wanted = "mode steps tokens labelled_tokens loss_before loss_after keep_mean fidelity_mean tokens_per_s peak_gib"
    assert {*wanted.split(), "seed", "versions"} <= stored.keys()
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert stored["tokens"] == sum(record["tokens"] for record in records)
    assert stored["peak_gib"] == max(record["peak_gib"] for record in records) > 0
    assert stored["peak_reserved_gib"] is None
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["step_s"])
        assert len(record["keep"]) == len(record["fidelity"]) == 2
        assert 0 < record["keep_mean"] <= 1
        assert record["fidelity_mean"] >= 0.98
        # Two documents of 24 labels each, but for the odd one at an epoch's end; padding isn't counted.
        assert record["labelled_tokens"] in (24, 48)
        assert record["tokens"] <= 2 * 160
    assert stored["loss_after"] < stored["loss_before"]
    assert [bucket["start"] for bucket in stored["by_position"]] == [0, 64, 128]
    assert sum(bucket["tokens"] for bucket in stored["by_position"]) == 48
    assert stored["sample"].keys() == {"prompt_tail", "reference", "before", "after"}


@pytest.mark.parametrize("mode", ["dense", "backward"])
def test_density_of_what_queries_see(place: Path, tmp_path: Path, mode: str) -> None:
    attend = "sparsity.attend={density: 0.3, block: 4, choice: random}"
    summary = finetune(settings(place, tmp_path / "run", f"sparsity.mode={mode}", "sparsity.block_size=1", attend))
    densities = [line["density"] for line in lines(tmp_path / "run")]
    assert len(densities) == 6
    assert all(0.2 < density <= 0.3 for density in densities)
    assert summary.density_mean == pytest.approx(sum(densities) / 6)
    assert f"keep {summary.keep_mean:.3f}, density {summary.density_mean:.3f}, peak" in summary.headline()


def test_the_adapter_is_stock_peft_and_evaluates_to_the_summary(place: Path, tmp_path: Path) -> None:
    config = settings(place, tmp_path / "run")
    summary = finetune(config)
    result = evaluate_model(config, tmp_path / "run/adapter")
    assert result.result.loss == pytest.approx(summary.loss_after, rel=1e-6)
    assert evaluate_model(config).result.loss == pytest.approx(summary.loss_before, rel=1e-6)
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "ids = torch.arange(10, 60)[None]\n"
        "with torch.no_grad(): print(model(input_ids=ids).logits.double().sum().item())\n"
        "assert not any(name.split('.')[0] == 'lemo' for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(place / "model"), str(tmp_path / "run/adapter")],
        capture_output=True,
        text=True,
        check=True,
    )
    from lemo.models.loading import load_adapter

    model: Any = load_adapter(load_model(config.model, "cpu")[0], tmp_path / "run/adapter").eval()
    with torch.no_grad():
        ours = model(input_ids=torch.arange(10, 60)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(ours, rel=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        ("sparsity.mode=dense",),
        ("sparsity.mode=dense", "training.gradient_checkpointing=false"),
        ("sparsity.mode=forward", "sparsity.keep=0.6"),
        ("sparsity.mode=forward", "sparsity.keep=0.6", "training.gradient_checkpointing=false"),
        ("sparsity.policy=segments", "data.completion_tokens=0", "training.batch_size=2"),
        ("data.packing=true", "data.max_tokens=250"),
        ("model.dtype=bfloat16",),
    ],
)
def test_every_mode_trains(place: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    summary = finetune(settings(place, tmp_path / "run", *overrides))
    assert summary.loss_before is not None
    assert summary.loss_after is not None
    assert summary.loss_after < summary.loss_before
    expected = 1.0 if "sparsity.mode=dense" in overrides else pytest.approx(0.5, abs=0.45)
    assert summary.keep_mean == expected


def test_checkpointing_changes_memory_not_learning(place: Path, tmp_path: Path) -> None:
    for value in ("true", "false"):
        mode = ("sparsity.mode=forward", "sparsity.keep=0.6", "lora.dropout=0.2")
        finetune(settings(place, tmp_path / value, *mode, f"training.gradient_checkpointing={value}"))
    true, false = ([record["loss"] for record in lines(tmp_path / value)] for value in ("true", "false"))
    assert true == pytest.approx(false, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trainer: LemoTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(trainer, *args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 2 else loss

    original = LemoTrainer.compute_loss
    monkeypatch.setattr(LemoTrainer, "compute_loss", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 3; lower training\.learning_rate"):
        finetune(settings(place, tmp_path / "run"))
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/checkpoint-2").exists()


def test_without_evaluation_and_checkpoints(place: Path, tmp_path: Path) -> None:
    summary = finetune(settings(place, tmp_path / "run", "evaluation.documents=0", "training.save_every=0"))
    assert (summary.loss_before, summary.loss_after, summary.sample, summary.by_position) == (None, None, None, [])
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["adapter", "config.yaml", "metrics.jsonl", "summary.json"]


def test_the_saved_configuration_repeats_the_run(place: Path, tmp_path: Path) -> None:
    finetune(settings(place, tmp_path / "run"))
    again = load_config(tmp_path / "run/config.yaml", output=str(tmp_path / "again"))
    finetune(again)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_nothing_is_written_when_a_check_fails(place: Path, tmp_path: Path) -> None:
    for overrides in (("data.max_tokens=300",), ("sparsity.keep=0.1", "data.completion_tokens=100")):
        with pytest.raises(UserError):
            finetune(settings(place, tmp_path / "run", *overrides))
        assert not (tmp_path / "run").exists()


def row(length: int, labelled: range, positions: list[int] | None = None) -> dict[str, Any]:
    labels = [7 if index in labelled else -100 for index in range(length)]
    extra = {} if positions is None else {"position_ids": positions}
    return {"name": "doc", "input_ids": [7] * length, "labels": labels, **extra}


def keep(value: float, **more: Any) -> RunConfig:
    return RunConfig.model_validate({"sparsity": {"keep": value, "block_size": 10, **more}})


def test_labels_are_checked_by_the_block_that_predicts_them() -> None:
    # Label 10 is predicted by token 9, in block 0: one block of four.
    check_labels_fit([row(40, range(10, 11))], keep(0.25))
    # Labels 10 and 11 are predicted from blocks 0 and 1.
    with pytest.raises(UserError, match=r"doc: 2 of its 4 blocks hold labels.*allows 1; .*policy=segments"):
        check_labels_fit([row(40, range(10, 12))], keep(0.25))
    check_labels_fit([row(40, range(10, 12))], keep(0.25, labelled="ranked"))
    check_labels_fit([row(40, range(10, 12))], RunConfig())


def test_labels_are_checked_in_each_packed_document() -> None:
    packed = [*range(20), *range(20)]
    check_labels_fit([row(40, range(25, 30), packed)], keep(0.5))
    with pytest.raises(UserError, match=r"2 of its 2 blocks"):
        check_labels_fit([row(40, range(25, 40), packed)], keep(0.5))


def test_length_and_fingerprints(place: Path) -> None:
    model, _ = load_model(settings(place, Path("x")).model, "cpu")
    check_length(model, settings(place, Path("x"), "data.max_tokens=256"))
    with pytest.raises(UserError, match="has 256 positions"):
        check_length(model, settings(place, Path("x"), "data.max_tokens=257"))
    before = fingerprint_model(model)
    assert fingerprint_model(model.to(torch.bfloat16)) == before
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[3] += 1
    assert fingerprint_model(model) != before
