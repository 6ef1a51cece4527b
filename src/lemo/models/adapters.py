"""Trained LoRA adapters, checked against the model before anything is changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from lemo.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def load_adapter(model: nn.Module, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """A model with a LoRA adapter in PEFT's format, as stock `PeftModel.from_pretrained` gives.

    Args:
        model: the base model, sparsified or not; its linears are replaced in place.
        path: directory that holds `adapter_config.json` and `adapter_model.safetensors`.
        trainable: whether the adapter's parameters require gradients.

    Raises:
        UserError: no adapter there, a damaged one, or one of another model.
        ValueError: the model has an adapter already.
    """
    directory = Path(path)
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already; give load_adapter the base model")
    config = _read_config(directory)
    shapes = _read_shapes(directory)
    _check_base(model, config, directory)
    _check_shapes(model, shapes, directory)
    try:
        adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {directory} doesn't load onto this model: {_one_line(error)}; load the model it was "
            "trained on"
        ) from error
    absent = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - shapes.keys())
    if absent:
        adapted.unload()
        raise UserError(
            f"the adapter in {directory} lacks {len(absent)} tensors that its {CONFIG} promises, {absent[0]} for "
            "one; copy it again, or train it anew"
        )
    return adapted


def _read_config(directory: Path) -> PeftConfig:
    if not directory.is_dir():
        raise UserError(f"there is no adapter directory {directory}; check the path")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(
                f"{directory} holds no adapter ({name} is missing); give the directory adapter/ that a run wrote"
            )
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{directory / CONFIG} is damaged, or of a newer PEFT: {_one_line(error)}; copy the adapter again, "
            "or upgrade peft"
        ) from error
    if config.peft_type != "LORA":
        raise UserError(f"{directory} holds a {config.peft_type} adapter; lemo loads LoRA adapters only")
    return config


def _read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, from the file's header."""
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{directory / WEIGHTS} is damaged: {_one_line(error)}; copy the adapter again, or use another one"
        ) from error


def _check_base(model: nn.Module, config: PeftConfig, directory: Path) -> None:
    """Compares the last parts of the two base models' names: directories move, models keep their names."""
    recorded = config.base_model_name_or_path
    actual = getattr(model, "name_or_path", "")
    if recorded and actual and _last_part(recorded) != _last_part(actual):
        raise UserError(
            f"the adapter in {directory} was trained on {recorded}, this model is {actual}; load that model, or, "
            f"if they are the same, correct base_model_name_or_path in {CONFIG}"
        )


def _check_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Each LoRA pair must fit a linear of the model: A is [r, in], B is [out, r]."""
    modules = dict(model.named_modules())
    if not shapes:
        raise UserError(f"the adapter in {directory} holds no tensors; train it anew")
    for name, shape in shapes.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            continue
        module: Any = modules.get(match[1])
        if module is None:
            raise UserError(
                f"the adapter in {directory} is of another model: it adapts {match[1]}, which this one lacks; "
                "load the model it was trained on"
            )
        side, axis = ("in_features", 1) if match[2] == "A" else ("out_features", 0)
        wanted = getattr(module, side, shape[axis])
        if shape[axis] != wanted:
            raise UserError(
                f"the adapter in {directory} is of another model: {name} is {list(shape)}, but {match[1]} has "
                f"{wanted} {side}; load the model it was trained on"
            )


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
