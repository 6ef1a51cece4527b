"""Liger's kernels on one model, for the step benchmark's baseline."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lemo.errors import UserError


def check_liger(device: str, method: str) -> None:
    """Refuses Liger's kernels where they can't run.

    Args:
        device: where they would run.
        method: the row that asks for them.

    Raises:
        UserError: liger-kernel isn't installed, or the device is no GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{method} needs liger-kernel; pip install liger-kernel, or leave the method out")
    if device == "cpu":
        raise UserError(f"{method} needs a GPU; leave the method out, or give --device cuda")


@contextmanager
def liger_kernels(causal_lm: Any) -> Iterator[None]:
    """Inside, a transformers CausalLM runs with all of Liger's kernels: norms, rotation, SwiGLU, fused linear loss.

    Args:
        causal_lm: the model; it stays patched and must not be used afterwards.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    with modeling_kept(causal_lm):
        _apply_liger_kernel_to_instance(model=causal_lm)
        yield


@contextmanager
def modeling_kept(causal_lm: Any) -> Iterator[None]:
    """What Liger replaces inside in transformers' module of the architecture is put back: later models are made of it.

    Args:
        causal_lm: a model of the architecture.
    """
    module = sys.modules[type(causal_lm.get_decoder().layers[0].self_attn).__module__]
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)
