"""Shapes of well-known models, for steps with random weights: what a step costs doesn't depend on what weights say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' configuration keys, from the models' own config.json.
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
}  # fmt: skip


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
