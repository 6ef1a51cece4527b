"""What choosing costs `forward` mode: predicting and selecting, beside the dense forward of the same layer.

`python -m benchmarks.record_prediction SHAPE TOKENS FILE.jsonl`; random weights, predictors of the default size before
they shrink, blocks of 64, thresholds that keep half.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import lemo
from lemo.bench import records
from lemo.bench.ops import op_row
from lemo.bench.records import Record
from lemo.bench.shapes import build_shape
from lemo.config import BranchSelection, PredictorConfig, SparsityConfig
from lemo.models import get_runtime
from lemo.models.calibration import BRANCHES
from lemo.models.device import choose_device
from lemo.models.watching import BranchCall, watch
from lemo.selection.layout import build_layout
from lemo.selection.predictor import KINDS, predicted_scores
from lemo.selection.scores import select_by_score

BLOCK = 64


@torch.no_grad()
def measure(shape: str, T: int) -> list[Record]:
    """Rows: a layer's dense forward, and the choice of both branches from their normalised inputs."""
    device = choose_device("auto")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = build_shape(shape, 1, T, dtype, device)
    config = SparsityConfig(mode="forward", keep=0.5, block_size=BLOCK)
    lemo.sparsify(model, config).eval()
    runtime = get_runtime(model)
    assert runtime is not None
    seen: dict[str, torch.Tensor] = {}

    def visit(call: BranchCall) -> None:
        seen[call.branch] = call.x

    ids = torch.randint(model.config.vocab_size, (1, T), device=device)
    decoder = model.get_decoder()
    with watch(model, visit):
        decoder(input_ids=ids, use_cache=False)
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(T, device=device)[None]
    layer, rotary = decoder.layers[0], decoder.rotary_emb(hidden, positions)
    layout = build_layout(1, T, BLOCK, torch.device(device))
    predictors = {b: KINDS[b](seen[b].shape[1], PredictorConfig().widths).to(device) for b in BRANCHES}
    selections = {}
    for branch, predictor in predictors.items():
        predictor.requires_grad_(False)
        half = predicted_scores(predictor, seen[branch], layout, False).median()
        selections[branch] = BranchSelection(threshold=(float(half),))

    def choose() -> None:
        for branch, predictor in predictors.items():
            score = predicted_scores(predictor, seen[branch], layout, False)
            select_by_score(score, layout, selections[branch], 0)

    def forward() -> None:
        layer(hidden, position_embeddings=rotary, attention_mask=None)

    calls = {"dense forward of a layer": forward, "choice": choose}
    return [op_row(f"prediction: {name}", "lemo-forward", shape, T, run, device) for name, run in calls.items()]


if __name__ == "__main__":
    shape, tokens, file = sys.argv[1:]
    records.write(measure(shape, int(tokens)), Path(file))
