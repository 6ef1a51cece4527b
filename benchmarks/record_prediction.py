"""What choosing costs `forward` mode: predicting and selecting, beside the forward of the same layers.

`python -m benchmarks.record_prediction SHAPE TOKENS FILE.jsonl`; random weights, predictors of the default size before
they shrink, blocks of 64. Where all blocks are kept, what the choices add to the forward is what they cost in place:
forwards with and without them take turns, since a GPU's clock drifts by more than that; `details` has the differences
of neighbours. Alone, with thresholds that keep half, the device waits for each.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lemo
from lemo.bench import records
from lemo.bench.ops import op_record, op_row
from lemo.bench.records import Record
from lemo.bench.shapes import build_shape
from lemo.bench.step import random_predictors
from lemo.bench.timing import Timed, time_calls
from lemo.config import BranchSelection, SparsityConfig
from lemo.models import get_runtime, sparse_evaluation
from lemo.models.calibration import BRANCHES
from lemo.models.device import choose_device
from lemo.models.mixins import VIEW
from lemo.models.runtime import flag
from lemo.selection.layout import build_layout
from lemo.selection.predictor import predicted_scores
from lemo.selection.score_heads import ScoreHeads
from lemo.selection.scores import select_by_score

BLOCK, LAYERS, TURNS = 64, 4, 21


@torch.no_grad()
def measure(shape: str, T: int) -> list[Record]:
    """Rows: layers' forward, the same with the choice of both branches where it keeps all, the choice alone."""
    device = choose_device("auto")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = build_shape(shape, LAYERS, T, dtype, device)
    # At 0 nobody chooses; at next to nothing all blocks are chosen, so that choosing is all that is added.
    zero, least = ({b: BranchSelection(threshold=t) for b in BRANCHES} for t in (0.0, 1e-30))
    lemo.sparsify(model.requires_grad_(False), SparsityConfig(mode="forward", block_size=BLOCK, **zero)).eval()
    runtime = get_runtime(model)
    assert runtime is not None
    decoder = model.get_decoder()
    ids = torch.randint(model.config.vocab_size, (1, T), device=device)
    runtime.predictors = random_predictors(shape, LAYERS, device)
    hidden = decoder.embed_tokens(ids)[0]
    layout = build_layout(1, T, BLOCK, torch.device(device))
    view = getattr(decoder.layers[0], VIEW)
    positions = torch.arange(T, device=device)[None]
    rotary = [x[0] for x in decoder.rotary_emb(hidden[None], positions)] if hasattr(decoder, "rotary_emb") else None
    rotate = functools.partial(view.rotate, rotary=rotary)

    def score(layer: int, branch: str) -> torch.Tensor:
        predictor = runtime.predictors[layer, branch]
        if isinstance(predictor, ScoreHeads):
            norm = view.attention_norm, view.attention_norm_weights
            return predictor.scores(hidden, *norm, rotate, layout, view.window, causal=False, mass=False)
        return predicted_scores(predictor, hidden, view.mlp_norm, view.mlp_norm_weights, layout, False)

    halves = {
        (layer, branch): BranchSelection(threshold=float(score(layer, branch).median()))
        for layer in range(LAYERS)
        for branch in BRANCHES
    }

    def choose(*branches: str) -> None:
        for layer in range(LAYERS):
            for branch in branches:
                select_by_score(score(layer, branch), layout, halves[layer, branch], 0)

    def everything(selection: dict[str, BranchSelection]) -> Callable[[], None]:
        config = runtime.config.model_copy(update=selection)

        def run() -> None:
            with flag(runtime, "config", config), sparse_evaluation(model):
                decoder(input_ids=ids, use_cache=False)
            assert runtime.collect().keep_mean == 1.0

        return run

    without, chosen = everything(zero), everything(least)
    for run in (without, chosen):
        run()
    turns = [[time_calls(run, device, warm_up=0, repeats=1) for run in (without, chosen)] for _ in range(TURNS)]
    added = [b.ms[0] - a.ms[0] for a, b in turns]
    names = f"forward of {LAYERS} layers without a choice", f"the same, with {2 * LAYERS} choices that keep all"
    rows = []
    for name, times in zip(names, zip(*turns, strict=True), strict=True):
        timed = Timed(tuple(x.ms[0] for x in times), max(x.peak_gib or 0.0 for x in times), None)
        row = op_record(timed, setting=f"prediction: {name}", method="lemo-forward", shape=shape, T=T, steps=TURNS)
        row.details = {"added_ms": statistics.median(added), "added_ms_min": min(added), "added_ms_max": max(added)}
        print(f"{name}: {row.step_ms:.2f} ms, choices add {row.details['added_ms']:.2f} ms", flush=True)
        rows.append(row)
    for name, branches in (("both branches", BRANCHES), *((branch, (branch,)) for branch in BRANCHES)):
        run = functools.partial(choose, *branches)
        rows.append(
            op_row(f"prediction: choices of {LAYERS} layers, {name}, alone", "lemo-forward", shape, T, run, device)
        )
    return rows


if __name__ == "__main__":
    shape, tokens, file = sys.argv[1:]
    records.write(measure(shape, int(tokens)), Path(file))
