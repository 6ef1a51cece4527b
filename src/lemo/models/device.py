"""Which device a run uses."""

from __future__ import annotations

import os

import torch

from lemo.errors import UserError


def choose_device(name: str) -> str:
    """`auto` is this process's CUDA device where there is one, else the CPU; under torchrun each process has its own.

    Raises:
        UserError: CUDA is asked for and torch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
