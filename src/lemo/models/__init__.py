"""Model surgery: `sparsify` a transformers model, `restore` it, and look at what it leaves out."""

from __future__ import annotations

from lemo.models.bypasses import fit_bypasses
from lemo.models.surgery import backbone_hidden, dense, get_runtime, restore, sparse_evaluation, sparsify

__all__ = ["backbone_hidden", "dense", "fit_bypasses", "get_runtime", "restore", "sparse_evaluation", "sparsify"]
