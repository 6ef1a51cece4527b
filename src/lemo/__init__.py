"""LeMo: long-context fine-tuning that leaves out the token blocks that don't matter.

>>> import lemo
>>> model = lemo.sparsify(model, lemo.SparsityConfig(mode="backward", fidelity=0.98))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lemo.config import SparsityConfig
from lemo.errors import UserError

if TYPE_CHECKING:
    from lemo.models import restore, sparsify

__version__ = "0.1.0"
__all__ = ["SparsityConfig", "UserError", "restore", "sparsify"]


def __getattr__(name: str) -> Any:
    """`sparsify` and `restore` import torch, so they load when first used."""
    if name in ("restore", "sparsify"):
        from lemo import models

        return getattr(models, name)
    raise AttributeError(f"module 'lemo' has no attribute '{name}'")
