"""Adapters load as stock PEFT loads them; damaged and foreign ones are refused with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lemo.models
from lemo.config import ModelConfig, SparsityConfig
from lemo.errors import UserError
from lemo.models.loading import load_adapter, load_model
from tiny import add_lora


@pytest.fixture
def adapter(tiny_dir: Path) -> Path:
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_dir))
    model.save_pretrained(tiny_dir.parent / "adapter")
    return tiny_dir.parent / "adapter"


@pytest.mark.parametrize("sparse", [False, True])
def test_an_adapter_gives_stock_pefts_logits(tiny_dir: Path, adapter: Path, sparse: bool) -> None:
    tokens = torch.arange(20)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), adapter).eval()
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    without = model(tokens).logits
    if sparse:
        lemo.models.sparsify(model, SparsityConfig())
    ours = load_adapter(model, adapter).eval()
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    assert not torch.allclose(ours(tokens).logits, without)
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_trainable_adapter(tiny_dir: Path, adapter: Path) -> None:
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    ours = load_adapter(model, adapter, trainable=True)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, _ in ours.named_parameters() if "lora_" in n
    }
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(ours, adapter)


def _edit_adapter(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _no_adapter_dir(directory: Path) -> None:
    shutil.rmtree(directory)


def _no_adapter_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def _no_adapter_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def _broken_adapter_config(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


def _cut_adapter(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _half_adapter(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.2" not in k}, directory / "adapter_model.safetensors")


def _more_layers(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors |= {k.replace("layers.0", "layers.7"): v.clone() for k, v in tensors.items() if "layers.0" in k}
    save_file(tensors, directory / "adapter_model.safetensors")


def _wider(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(
        {k: torch.zeros(v.shape[0], 48) if "q_proj.lora_A" in k else v for k, v in tensors.items()},
        directory / "adapter_model.safetensors",
    )


def _other_rank(directory: Path) -> None:
    _edit_adapter(directory, r=7)


def _other_base(directory: Path) -> None:
    _edit_adapter(directory, base_model_name_or_path="someone/other-llama")


def _other_type(directory: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_adapter_dir, "there is no adapter directory"),
        (_no_adapter_config, r"adapter_config\.json is missing"),
        (_no_adapter_weights, r"adapter_model\.safetensors is missing"),
        (_broken_adapter_config, r"adapter_config\.json is damaged.*copy the adapter again"),
        (_cut_adapter, r"adapter_model\.safetensors is damaged.*copy the adapter again"),
        (_half_adapter, r"lacks \d+ tensors.*layers\.2.*copy it again"),
        (_more_layers, r"it adapts model\.layers\.7\..*load the model it was trained on"),
        (_wider, r"is \[4, 48\], but .*q_proj has 32 in_features; load the model"),
        (_other_rank, "doesn't load onto this model: .*load the model it was trained on"),
        (_other_base, "was trained on someone/other-llama, this model is .*tiny-llama; load that model"),
        (_other_type, "PROMPT_TUNING adapter; lemo loads LoRA adapters only"),
    ],
)
def test_a_damaged_or_foreign_adapter(tiny_dir: Path, adapter: Path, damage: Any, message: str) -> None:
    damage(adapter)
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_survives_the_moving_of_its_base(tiny_dir: Path, adapter: Path) -> None:
    moved = tiny_dir.parent / "elsewhere" / tiny_dir.name
    moved.parent.mkdir()
    tiny_dir.rename(moved)
    model, _ = load_model(ModelConfig(name=str(moved)), "cpu")
    assert isinstance(load_adapter(model, adapter), PeftModel)


def test_an_adapter_on_the_head(tiny_dir: Path) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir), config)
    model.save_pretrained(tiny_dir.parent / "adapter")
    base, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    assert isinstance(load_adapter(base, tiny_dir.parent / "adapter"), PeftModel)
