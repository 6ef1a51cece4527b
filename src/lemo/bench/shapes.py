"""Shapes of well-known models, for steps with random weights: what a step costs doesn't depend on what weights say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lemo.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' configuration keys, from the models' own config.json; OPT without its dropout, as the others.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True,
    },
    "opt-1.3b": {
        "model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "vocab_size": 50272, "word_embed_proj_dim": 2048, "dropout": 0.0,
    },
    "opt-350m": {
        "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": 50272, "word_embed_proj_dim": 512, "do_layer_norm_before": False, "dropout": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """Numbers a token of one layer, and what its linears are called.

    Attributes:
        D, A, K, F: the hidden size, query heads · head size, key heads · head size, the MLP's width.
        d: head size.
        head: what enters the language-model head; OPT-350M projects down to it.
        pre_norm: False where norms follow the addition (OPT-350M).
        attention, mlp: (in, out) of each linear by its name; a gated MLP has three.
    """

    D: int
    A: int
    K: int
    F: int
    d: int
    head: int
    pre_norm: bool
    attention: dict[str, tuple[int, int]]
    mlp: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, shape: str) -> Widths:
        values = SHAPES[shape]
        names = architecture_of(values["model_type"])
        D, heads = values["hidden_size"], values["num_attention_heads"]
        d = values.get("head_dim", D // heads)
        A, K = heads * d, values.get("num_key_value_heads", heads) * d
        F = values["ffn_dim"] if "ffn_dim" in values else values["intermediate_size"]
        attention = {names.query: (D, A), names.key: (D, K), names.value: (D, K), names.output: (A, D)}
        mlp = {name: (D, F) for name in (names.gate, names.up) if name} | {names.down: (F, D)}
        head = values.get("word_embed_proj_dim", D)
        return cls(D, A, K, F, d, head, values.get("do_layer_norm_before", True), attention, mlp)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its projection."""
        return len(self.mlp) == 3


def full_depth(shape: str) -> int:
    """Layers of the model itself."""
    return int(SHAPES[shape]["num_hidden_layers"])


def build_shape(shape: str, layers: int, positions: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A CausalLM of that shape with random weights.

    Args:
        shape: a key of `SHAPES`.
        layers: how many layers it gets.
        positions: longest sequence (tokens) it must take.
        dtype: of the weights.
        device: where they are made.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SHAPES[shape], "num_hidden_layers": layers, "max_position_embeddings": positions, "use_cache": False}
    config = AutoConfig.for_model(**values)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
