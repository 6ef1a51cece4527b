"""Fine-tuning: a thin layer on transformers.Trainer and PEFT.

summary = lemo.training.finetune(cfg)     # cfg: lemo.config.RunConfig
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lemo.training.directory import is_main_process
from lemo.training.summary import Summary

if TYPE_CHECKING:
    from lemo.training.callback import SparsityCallback
    from lemo.training.job import finetune
    from lemo.training.trainer import LemoTrainer

__all__ = ["LemoTrainer", "SparsityCallback", "Summary", "finetune", "is_main_process"]


def __getattr__(name: str) -> Any:
    """What needs torch loads when first used."""
    if name == "finetune":
        from lemo.training.job import finetune

        return finetune
    if name == "SparsityCallback":
        from lemo.training.callback import SparsityCallback

        return SparsityCallback
    if name == "LemoTrainer":
        from lemo.training.trainer import LemoTrainer

        return LemoTrainer
    raise AttributeError(f"module 'lemo.training' has no attribute '{name}'")
