"""A model and its sparsified copy, and one training step of either."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lemo
from lemo.config import Attend
from reference import gradients
from tiny import BLOCK, Batch, build

TINY_TILE_MIB = 0.002  # a few rows of a tiny MLP, so that one batch takes many tiles

ATTEND: dict[str, dict[str, Any]] = {
    "pooled": {"density": 0.75, "choice": "pooled", "window": 2},
    "half": {"density": 0.6, "choice": "pooled"},
    "random": {"density": 0.75, "choice": "random", "window": 3},
    "sampled": {"density": 0.75, "choice": "sampled", "window": 3},
    "none": {"density": 0.6, "choice": "none"},
    "window": {"density": None, "choice": "none", "window": 4},
    "labelled": {"density": 0.3, "choice": "pooled", "labelled": "dense"},
}


def config(**values: Any) -> lemo.SparsityConfig:
    """A configuration with the tests' block size and tiling off."""
    return lemo.SparsityConfig(**({"block_size": BLOCK, "tile_mib": 0.0} | values))


def attends(which: str, **more: Any) -> Attend:
    return Attend(**({"block": 2} | ATTEND[which] | more))


def pair(family: str, device: torch.device, settings: lemo.SparsityConfig, **model: Any) -> tuple[nn.Module, nn.Module]:
    """(unmodified model, sparsified copy with the same parameters)."""
    dense = build(family, device, **model)
    sparse = lemo.sparsify(copy.deepcopy(dense), settings)
    lemo.models.get_runtime(sparse).keep_lists = True
    return dense, sparse


def step(model: nn.Module, batch: Batch, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward."""
    loss = model(**batch.inputs(), **call).loss
    loss.backward()
    return loss.detach(), gradients(model)


def rows_of_plans(model: nn.Module) -> dict[tuple[int, str], set[int]]:
    """The rows that the last forward let take part, by layer and branch."""
    runtime = lemo.models.get_runtime(model)
    assert runtime is not None
    return {key: set(plan.rows.tolist()) for key, plan in runtime.last_plans.items()}
