"""Fits the low-rank bypasses of a model in `forward` mode (`lemo.sparse.bypass`) on a sample of its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lemo.models.surgery import get_runtime, hold_bypasses
from lemo.models.watching import BranchCall, watch
from lemo.sparse.bypass import BypassFit

RANK = 64


@torch.no_grad()
def fit_bypasses(
    model: Any, batches: Iterable[Mapping[str, Tensor]], *, rank: int = RANK
) -> dict[tuple[int, str], float]:
    """From now on tokens left out of a branch get the output of a linear map of rank `rank` in the branch's place.

    The maps are fitted to what the branches of the dense model put out on the batches, padding left out. One pass, of
    which sums are kept: twice D² numbers a branch. They train if `SparsityConfig.train_bypass` says so, and `restore`
    takes them away.

    Args:
        model: sparsified with mode `forward`, PEFT or not; it stays in its train or eval mode.
        batches: `input_ids` [B, T] and, with padding, `attention_mask`, on the model's device. Some thousand tokens.
        rank: r; the hidden size is the most.

    Returns:
        (layer, 'attention' | 'mlp') -> share of the variance of the branch's output on the batches its map explains.

    Raises:
        ValueError: another mode, no batches, or a rank over the hidden size.
    """
    runtime = get_runtime(model)
    if runtime is None or runtime.config.mode != "forward":
        raise ValueError(
            "bypasses belong to mode forward; call lemo.sparsify with SparsityConfig(mode='forward') first"
        )
    fits: dict[tuple[int, str], BypassFit] = {}
    rows = torch.empty(0, dtype=torch.bool)

    def visit(call: BranchCall) -> None:
        add_to_fit(fits, call, rows)

    training = model.training
    model.eval()
    try:
        with watch(model, visit):
            for batch in batches:
                ids = batch["input_ids"]
                mask = batch.get("attention_mask")
                rows = torch.ones_like(ids).bool().flatten() if mask is None else mask.bool().flatten()
                model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
    if not fits:
        raise ValueError("fit_bypasses got no batches; give it some thousand tokens of the data")
    solved = {key: fit.solve(rank) for key, fit in fits.items()}
    hold_bypasses(model, {key: bypass for key, (bypass, _) in solved.items()})
    return {key: explained for key, (_, explained) in solved.items()}


def add_to_fit(fits: dict[tuple[int, str], BypassFit], call: BranchCall, rows: Tensor) -> None:
    """Adds a branch's rows to its fit, which is begun with the first.

    Args:
        fits: by (layer, branch).
        call: the branch's.
        rows: bool [B·T], which count.
    """
    fit = fits.setdefault((call.layer, call.branch), BypassFit(call.y.shape[-1], call.y.device))
    fit.add(call.x[rows], call.y[rows])
