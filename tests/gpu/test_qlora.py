"""LoRA on a base model quantised to 4 bits by bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lemo

pytestmark = pytest.mark.gpu

T, LABELS, VOCAB = 1024, 128, 512


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=T,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def gradients(checkpoint: Path, device: torch.device, fidelity: float | None) -> tuple[float, torch.Tensor]:
    """Loss, and the LoRA gradients as one fp32 vector; `fidelity` None is the model as PEFT trains it."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": device}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=fidelity is None)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    if fidelity is not None:
        model = lemo.sparsify(model, lemo.SparsityConfig(fidelity=fidelity, block_size=16))
    model.train()
    tokens = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(2)).to(device)
    labels = tokens.clone()
    labels[:, :-LABELS] = -100
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    found = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found)


def test_a_quantised_base_trains_as_with_peft(checkpoint: Path, device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    dense_loss, dense = gradients(checkpoint, device, None)
    loss, exact = gradients(checkpoint, device, 1.0)
    assert loss == pytest.approx(dense_loss, rel=2e-3)
    assert exact.shape == dense.shape
    assert ((exact - dense).norm() / dense.norm()).item() < 0.03
    _, sparse = gradients(checkpoint, device, 0.9)
    difference = ((sparse - dense).norm() / dense.norm()).item()
    assert 0.03 < difference < 0.6
