"""transformers' Trainer and TRL's SFTTrainer: each step's loss and gradients are those of a direct call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import config
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import lemo
from reference import assert_same_gradients
from tiny import VOCAB, add_lora, build

WORDS = [f"w{i}" for i in range(VOCAB - 4)]
MODES: dict[str, dict[str, Any]] = {
    "backward": {"fidelity": 0.7},
    "forward": {"mode": "forward", "keep": 0.5},
    "dense": {"mode": "dense"},
}
SEGMENTS = {"policy": "segments", "segments": {"spans": 3, "drawn": 1}}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, no files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentence(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())


class Documents(Dataset):
    """Equal-length documents; the last tokens are labelled, or all."""

    def __init__(self, *, label_all: bool) -> None:
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(4, VOCAB, (8, 38), generator=generator)
        self.first = 0 if label_all else 29

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: self.first] = -100
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(labels), "labels": labels}


def recording(trainer_class: type[Trainer]) -> type[Trainer]:
    """The trainer, noting each micro-batch's inputs, its `num_items_in_batch` and its loss."""

    class Recording(trainer_class):  # type: ignore[valid-type, misc]
        seen: list[tuple[dict[str, Any], Any, float]]

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mine = {k: v.clone() for k, v in inputs.items() if k in CALLED_WITH and torch.is_tensor(v)}
            result = super().compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.seen.append((mine, kwargs.get("num_items_in_batch"), loss.item()))
            return result

    return Recording


CALLED_WITH = ("input_ids", "attention_mask", "position_ids", "labels")


class Compare(TrainerCallback):
    """Before each optimizer step: losses and gradients against direct calls of a sparsified twin."""

    def __init__(self, twin: nn.Module, seen: list[tuple[dict[str, Any], Any, float]]) -> None:
        self.twin, self.seen, self.steps = twin, seen, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.twin.load_state_dict(model.state_dict())
        assert self.seen, "the trainer never computed a loss"
        for inputs, items, loss in self.seen:
            direct = self.twin(**inputs, num_items_in_batch=items, use_cache=False).loss
            assert loss == pytest.approx(direct.item(), rel=1e-5)
            direct.backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        want = {n: p.grad.clone() for n, p in self.twin.named_parameters() if p.grad is not None}
        self.twin.zero_grad(set_to_none=True)
        assert_same_gradients(got, want)
        self.seen.clear()
        self.steps += 1


def run(trainer_class: type[Trainer], model: nn.Module, settings: lemo.SparsityConfig, **values: Any) -> Trainer:
    """Two optimizer steps, compared, after which the parameters have changed and are finite."""
    twin = lemo.sparsify(copy.deepcopy(model), settings)
    sparse = lemo.sparsify(model, settings)
    trainer = recording(trainer_class)(model=sparse, **values)
    trainer.seen = []
    compare = Compare(twin.to(trainer.args.device).train(), trainer.seen)
    trainer.add_callback(compare)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert compare.steps == 2
    end = {n: p for n, p in trainer.model.named_parameters() if n in start}
    assert all(torch.isfinite(p).all() for p in end.values())
    assert any(not torch.equal(start[n].to(p.device), p) for n, p in end.items())
    return trainer


def arguments(kind: type, folder: Path, **values: Any) -> Any:
    """Two steps of two micro-batches of two, no clipping, nothing written."""
    common = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": values.pop("device").type == "cpu",
    }
    return kind(**(common | values))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_trainer(mode: str, checkpointing: bool, device: torch.device, tmp_path: Path) -> None:
    args = arguments(TrainingArguments, tmp_path, device=device, gradient_checkpointing=checkpointing)
    model = build("llama", device)
    if checkpointing:
        model.enable_input_require_grads()
    run(Trainer, model, config(**MODES[mode]), args=args, train_dataset=Documents(label_all=False))


def test_trainer_with_segments(device: torch.device, tmp_path: Path) -> None:
    """The draws are random, so the loss is checked through the runtime's spans instead of a twin."""
    sparse = lemo.sparsify(build("qwen2", device), config(**SEGMENTS))
    args = arguments(TrainingArguments, tmp_path, device=device)
    trainer = recording(Trainer)(model=sparse, args=args, train_dataset=Documents(label_all=True))
    trainer.seen = []
    start = {n: p.detach().clone() for n, p in sparse.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(trainer.seen) == 4
    for inputs, items, loss in trainer.seen:
        assert int(items) == 4 * 37
        assert inputs["labels"].ne(-100).all()
        assert 0 < loss < 20
    assert all(torch.isfinite(p).all() for p in sparse.parameters())
    assert any(not torch.equal(start[n], p) for n, p in sparse.named_parameters() if n in start)
    stats = lemo.models.get_runtime(sparse).collect()
    assert stats.keep_mean == pytest.approx(1 / 3, abs=0.02)  # spans of 13, 13 and 12 of 38 tokens


def sft(folder: Path, device: torch.device, **values: Any) -> Any:
    trl = pytest.importorskip("trl")
    return arguments(trl.SFTConfig, folder, device=device, **({"max_length": 64} | values))


def conversations() -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": sentence(20 + 3 * i, i), "completion": " " + sentence(5, 50 + i)} for i in range(8)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("mode", MODES)
def test_sft_trainer(mode: str, family: str, device: torch.device, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    run(
        trl.SFTTrainer,
        build(family, device),
        config(**MODES[mode]),
        args=sft(tmp_path, device),
        train_dataset=conversations(),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_sft_trainer_packing_documents(mode: str, device: torch.device, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = [{"text": sentence(11 + 2 * i, i)} for i in range(16)]
    datasets = pytest.importorskip("datasets")
    settings = config(**(MODES[mode] | ({"labelled": "ranked"} if mode == "backward" else {})))
    trainer = run(
        trl.SFTTrainer,
        build("qwen3", device),
        settings,
        args=sft(tmp_path, device, padding_free=True, max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    assert isinstance(trainer, trl.SFTTrainer)


def test_sft_trainer_wraps_a_sparsified_model_itself(device: torch.device, tmp_path: Path) -> None:
    """`peft_config` given to SFTTrainer: LoRA comes after sparsify."""
    trl = pytest.importorskip("trl")
    peft_config = copy.deepcopy(add_lora(build("llama", device, lora=False)).peft_config["default"])
    peft_config.inference_mode = False
    sparse = lemo.sparsify(build("llama", device, lora=False), config(fidelity=0.7))
    trainer = trl.SFTTrainer(
        model=sparse,
        args=sft(tmp_path, device),
        train_dataset=conversations(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    stats = lemo.models.get_runtime(trainer.model).collect()
    assert stats.keep_mean < 1.0, "every block was kept: the sparse backward did not run"


def test_sft_trainer_refuses_segments(device: torch.device, tmp_path: Path) -> None:
    """SFTTrainer computes its own loss, so the drawn spans' loss would be bypassed."""
    trl = pytest.importorskip("trl")
    sparse = lemo.sparsify(build("llama", device), config(**SEGMENTS))

    def train() -> None:
        trainer = trl.SFTTrainer(
            model=sparse, args=sft(tmp_path, device), train_dataset=conversations(), processing_class=tokenizer()
        )
        trainer.train()

    with pytest.raises(ValueError, match=r"transformers\.?\s?Trainer|transformers'? Trainer|policy"):
        train()
