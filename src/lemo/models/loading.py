"""Models and tokenizers by name. What is wrong with a name or a directory is found before weights are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lemo.config import ModelConfig, RopeScaling
from lemo.errors import UserError
from lemo.models import embedded
from lemo.models.adapters import load_adapter
from lemo.models.architectures import architecture_of

__all__ = ["load_adapter", "load_model", "load_tokenizer", "model_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(cfg: ModelConfig, device: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A transformers CausalLM and its tokenizer.

    Args:
        cfg: which model, in which dtype, with which attention implementation, and how far its context is extended.
        device: `cpu` or `cuda` (or one of its devices, `cuda:1`).

    Returns:
        The model on `device` in eval mode, and the tokenizer, with a pad token.

    Raises:
        UserError: no such model, unsupported architecture, damaged files, positions that can't be scaled, or no such
            device; with the remedy.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    source = _source(cfg.name)
    _check_architecture(cfg.name, source)
    extended = {} if cfg.rope_scaling is None else {"config": _extended(cfg.name, source, cfg.rope_scaling)}
    tokenizer = load_tokenizer(cfg.name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=model_dtype(cfg, device),
            attn_implementation=cfg.attention,
            output_loading_info=True,
            **extended,
        )
        model, info = loaded
    except ImportError as error:
        raise UserError(
            f"can't load {cfg.name}: {_first_line(error)}; install it or set model.attention=sdpa"
        ) from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"can't load the weights of {cfg.name}: {_first_line(error)}; {_again(cfg.name)}") from error
    # transformers fills these with random numbers and goes on.
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise UserError(
            f"the weights of {cfg.name} lack {len(absent)} tensors of its config.json, {absent[0]} for one; "
            f"{_again(cfg.name)}"
        )
    # Models quantised by bitsandbytes are on their device already and refuse to move.
    if getattr(model, "quantization_method", None) is None:
        model.to(device)
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model name; one without a pad token pads with its end-of-sequence token.

    Raises:
        UserError: there is none, or it's damaged.
    """
    source = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    # tokenizers raises bare Exceptions for a damaged tokenizer.json.
    except Exception as error:
        raise UserError(f"can't load the tokenizer of {name}: {_first_line(error)}; {_again(name)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_dtype(cfg: ModelConfig, device: str) -> torch.dtype:
    """`cfg.dtype`, with `auto` filled in: bfloat16 on a GPU, float32 on a CPU."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return DTYPES[cfg.dtype]


def _source(name: str) -> str:
    """What transformers shall load: a directory, or a hub name."""
    if name == embedded.NAME:
        return str(embedded.materialise())
    path = Path(name).expanduser()
    if not path.exists():
        # The hub's names are `name` or `owner/name`.
        if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
            raise UserError(f"there is no model directory {name!r}; check model.name")
        return name
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{name} is an adapter, not a model; set model.name to what it was trained on")
        raise UserError(f"{name} holds no model (no config.json); set model.name to one that does")
    return str(path)


def _check_architecture(name: str, source: str) -> None:
    """Refuses an architecture lemo doesn't support, from the config alone."""
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the configuration of {name}: {_first_line(error)}; {_again(name)}") from error
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"the config.json of {name} names no model_type; {_again(name)}")
    try:
        architecture_of(model_type)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _extended(name: str, source: str, scaling: RopeScaling) -> PreTrainedConfig:
    """The model's configuration with its RoPE stretched and as many positions as that gives."""
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the configuration of {name}: {_first_line(error)}; {_again(name)}") from error
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise UserError(f"{name} has no RoPE, so its context can't be extended; leave model.rope_scaling out")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{name} scales its RoPE already ({rope['rope_type']}); leave model.rope_scaling out")
    positions = config.max_position_embeddings
    original = {"original_max_position_embeddings": positions} if scaling.rope_type == "yarn" else {}
    config.rope_parameters = {**rope, **scaling.model_dump(), **original}
    config.max_position_embeddings = int(scaling.factor * positions)
    return config


def _again(name: str) -> str:
    """What to do about a model that doesn't load."""
    if name == embedded.NAME:
        return f"delete {embedded.cache_root() / name} to have it rebuilt"
    if Path(name).expanduser().exists():
        return "copy or download the model again"
    return (
        "check that the name is right, that the network reaches huggingface.co, and that you have access; or set "
        f"model.name to a local directory or to {embedded.NAME}"
    )


def _first_line(error: BaseException) -> str:
    """An error in one line, without its closing full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
