"""What attention sees in tiny models, for tests of what estimates its scores."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import lemo
from lemo.models.watching import BranchCall, watch
from lemo.selection.head_choice import begin_heads, choices
from lemo.selection.score_heads import ScoreHeads
from tiny import VOCAB, build

SIZE, TOKENS = 8, 91


def attention_calls(family: str, tokens: int = TOKENS, seed: int = 1, **values: Any) -> list[BranchCall]:
    """What the attention of each layer of a tiny model sees of a document of random tokens."""
    model = build(family, **{"lora": False, **values}).eval()
    keep = lemo.config.BranchSelection(threshold=0.0)
    lemo.sparsify(model, lemo.SparsityConfig(mode="forward", block_size=SIZE, attention=keep, mlp=keep))
    found: list[BranchCall] = []
    with torch.no_grad(), watch(model, lambda call: found.append(call) if call.branch == "attention" else None):
        model(input_ids=torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed)))
    return found


@functools.cache
def call_of(family: str) -> BranchCall:
    return attention_calls(family)[1]


def queries_keys(call: BranchCall) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return call.view.query(call.x, call.rotary), call.view.key_value(call.x, call.rotary)[0]


def begun(call: BranchCall, count: int, mass: bool = False, shared: bool = False) -> ScoreHeads:
    view = call.view
    made = choices(*queries_keys(call), view.scaling, count, SIZE, view.window, mass)
    return begin_heads(view.head_projections(call.x), made[-1], view.scaling, shared=shared, mass=mass)


def rotate_of(call: BranchCall) -> Any:
    return functools.partial(call.view.rotate, rotary=call.rotary)
