"""Fits predictors and bypasses to a stream of sequences, in one pass of the frozen dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.calibration.config import CalibrationConfig
from lemo.models.bypasses import add_to_fit
from lemo.models.calibration import BRANCHES, Key
from lemo.models.watching import BranchCall, watch
from lemo.selection.predictor import KINDS, Predictor
from lemo.selection.predictor_blocks import part_of
from lemo.selection.predictor_training import Example, PredictorTraining
from lemo.selection.scores import block_pair_scores
from lemo.sparse.bypass import Bypass, BypassFit


@dataclass(frozen=True)
class Fitted:
    """By (layer, branch): predictors, bypasses; numbers in each predictor before it shrank; variance explained."""

    predictors: dict[Key, Predictor]
    bypasses: dict[Key, Bypass]
    first_size: dict[Key, int]
    explained: dict[Key, float]


def exact_scores(call: BranchCall, block_size: int, mass: bool) -> Tensor:
    """What a predictor is to estimate of one document: pair scores [n, n], or activities of its tokens [N]."""
    if call.branch == "attention":
        q = call.view.query(call.x, call.rotary)
        k, _ = call.view.key_value(call.x, call.rotary)
        return block_pair_scores(q, k, call.view.scaling, block_size, call.view.window, mass)
    return call.view.mlp_activity(call.x)


@torch.no_grad()
def fit(
    model: Any, sequences: Iterable[Tensor], count: int, config: CalibrationConfig, told: Callable[[int], None]
) -> Fitted:
    """Predictors and bypasses of every layer's branches that may leave blocks out.

    Args:
        model: sparsified with mode `forward`, in evaluation mode.
        sequences: token ids [T] on the model's device; read one at a time.
        count: how many there are.
        config: sizes and schedules.
        told: called with the number of sequences seen.
    """
    settings = config.predictor
    steps = -(-settings.steps // count)
    mass = config.score == "mass"
    branches = BRANCHES if config.branches == "both" else (config.branches,)
    torch.manual_seed(config.seed)
    # By branch, one a layer.
    seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    trainings: dict[str, PredictorTraining] = {}
    first_size: dict[str, int] = {}
    fits: dict[Key, BypassFit] = {}

    def visit(call: BranchCall) -> None:
        if call.branch not in branches:
            return
        seen[call.branch].append((call.x, exact_scores(call, part_of(config.block_size), mass)))
        if config.bypass_rank:
            add_to_fit(fits, call, torch.ones(call.x.shape[0], dtype=torch.bool, device=call.x.device))

    with watch(model, visit):
        for number, ids in enumerate(sequences, start=1):
            model.get_decoder()(input_ids=ids[None], use_cache=False)
            for branch, of_layers in seen.items():
                example = Example(*(torch.stack(values) for values in zip(*of_layers, strict=True)))
                if branch not in trainings:
                    L, _, D = example.x.shape
                    begun = [KINDS[branch](D, settings.widths).to(example.x.device) for _ in range(L)]
                    first_size[branch] = begun[0].size
                    trainings[branch] = PredictorTraining(begun, config.block_size, settings, config.seed, mass)
                trainings[branch].see(example, steps)
            seen.clear()
            told(number)
    solved = {key: fit.solve(min(config.bypass_rank, fit.width)) for key, fit in fits.items()}
    finished = {branch: training.finish() for branch, training in trainings.items()}
    predictors = {(layer, branch): one for branch, found in finished.items() for layer, one in enumerate(found)}
    return Fitted(
        predictors=predictors,
        bypasses={key: bypass for key, (bypass, _) in solved.items()},
        first_size={key: first_size[key[1]] for key in predictors},
        explained={key: explained for key, (_, explained) in solved.items()},
    )
