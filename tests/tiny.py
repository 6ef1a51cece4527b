"""Tiny random models and batches for the parity tests: every supported architecture, every kind of batch.

Shapes: B batch, T tokens, V vocabulary. A row is an index into the flattened B·T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 113
BLOCK = 6
WINDOW = 11

_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_QWEN_WINDOW = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _ROPE),
    "mistral": (MistralForCausalLM, MistralConfig, _ROPE | {"sliding_window": WINDOW}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _ROPE | {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, _ROPE | _QWEN_WINDOW),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _ROPE | {"head_dim": 12}),
    "opt": (OPTForCausalLM, OPTConfig, _OPT),
    "opt-350m": (
        OPTForCausalLM,
        OPTConfig,
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "_remove_final_layer_norm": False},
    ),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter with numbers that make each one matter (transformers' own are too small)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + (0.2 if parameter.dim() > 1 else 0.1) * noise)


def add_lora(model: nn.Module, *, dropout: float = 0.0, seed: int = 1) -> nn.Module:
    """LoRA on every linear but the head; `lora_B` gets random values, since zeros would hide errors."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def build(
    family: str,
    device: torch.device | str = "cpu",
    *,
    lora: bool = True,
    lora_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A tiny random model of that family in train mode, with LoRA on all linears unless `lora` is off."""
    model_class, config_class, values = FAMILIES[family]
    config = config_class(**(values | overrides))
    config._attn_implementation = attention
    model = model_class(config)
    randomise(model, seed)
    if lora:
        model = add_lora(model, dropout=lora_dropout, seed=seed + 1)
    return model.to(device=device, dtype=dtype).train()


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers CausalLM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, bottom first."""
    base = causal_lm(model).model
    return list((base.decoder if hasattr(base, "decoder") else base).layers)


def mlp_output_module(layer: nn.Module) -> nn.Module:
    """The module whose output the MLP branch adds to the residual."""
    return layer.mlp if hasattr(layer, "mlp") else layer.fc2


def mlp_down_module(layer: nn.Module) -> nn.Module:
    """The module whose input is the MLP's activity."""
    return layer.mlp.down_proj if hasattr(layer, "mlp") else layer.fc2


def window_of(model: nn.Module, layer: int) -> int | None:
    """The layer's sliding window in tokens, the query included; None when it sees everything before."""
    config = causal_lm(model).config
    if config.model_type == "mistral":
        return config.sliding_window
    types = getattr(config, "layer_types", None)
    return config.sliding_window if types is not None and types[layer] == "sliding_attention" else None


@dataclass
class Batch:
    """Documents in a batch. `documents` holds each document's rows, in order; other rows are padding."""

    name: str
    input_ids: Tensor
    labels: Tensor
    documents: list[list[int]]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def inputs(self, *, labels: bool = True) -> dict[str, Any]:
        """Keyword arguments as a user would pass them. No cache: with one, transformers ignores packing."""
        values = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        if labels:
            values["labels"] = self.labels
        return {key: value for key, value in values.items() if value is not None} | {"use_cache": False} | self.extra

    @property
    def rows(self) -> int:
        return self.input_ids.numel()

    def real_mask(self) -> Tensor:
        """Bool mask of the tokens that belong to a document."""
        mask = torch.zeros(self.rows, dtype=torch.bool, device=self.input_ids.device)
        mask[[row for document in self.documents for row in document]] = True
        return mask.view_as(self.input_ids)

    def labelled_rows(self) -> set[int]:
        """Rows whose logits enter the loss: those whose successor in the sequence has a label."""
        labels, T = self.labels.tolist(), self.labels.shape[1]
        return {b * T + t for b, row in enumerate(labels) for t in range(T - 1) if row[t + 1] != -100}

    def label_count(self) -> int:
        return len(self.labelled_rows())


# (sequences of document lengths, side of the padding or None, tokens labelled at each document's end)
_SHAPES: dict[str, tuple[list[list[int]], str | None, list[int]]] = {
    "plain": ([[43]], None, [8]),
    "right": ([[40], [27], [18]], "right", [8, 5, 4]),
    "left": ([[25], [41], [16]], "left", [5, 9, 3]),
    "packed": ([[21, 9, 17]], None, [5, 2, 4]),
    "packed2": ([[14, 19, 6], [31, 8]], None, [3, 5, 0, 7, 1]),
}
BATCHES = tuple(_SHAPES)
# every architecture with every kind of batch; two packed sequences at once only where masks differ in kind
CASES = [
    (family, batch)
    for family in FAMILIES
    for batch in BATCHES
    if batch != "packed2" or family in ("llama", "mistral", "opt")
]


def make_batch(name: str, device: torch.device | str = "cpu", *, label_all: bool = False, seed: int = 3) -> Batch:
    """One of BATCHES. `label_all` labels every token but each document's first (as packing collators do)."""
    shape, side, labelled = _SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    T = max(sum(lengths) for lengths in shape)
    ids = torch.zeros(len(shape), T, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    attention, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    documents: list[list[int]] = []
    for b, lengths in enumerate(shape):
        start = T - sum(lengths) if side == "left" else 0
        for length in lengths:
            end = start + length
            ids[b, start:end] = torch.randint(3, VOCAB, (length,), generator=generator)
            first = start + 1 if label_all else end - labelled[len(documents)]
            labels[b, first:end] = ids[b, first:end]
            attention[b, start:end] = 1
            positions[b, start:end] = torch.arange(length)
            documents.append(list(range(b * T + start, b * T + end)))
            start = end
    packed = any(len(lengths) > 1 for lengths in shape)
    return Batch(
        name=name,
        input_ids=ids.to(device),
        labels=labels.to(device),
        documents=documents,
        attention_mask=attention.to(device) if side else None,
        position_ids=positions.to(device) if packed else None,
    )
