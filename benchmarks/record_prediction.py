"""What choosing costs `forward` mode: predicting and selecting, beside the dense forward of the same layer.

`python -m benchmarks.record_prediction SHAPE TOKENS FILE.jsonl`; random weights, predictors of the default size before
they shrink, blocks of 64, half kept.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lemo
from lemo.bench import records
from lemo.bench.records import Record
from lemo.bench.shapes import build_shape
from lemo.bench.step import timed
from lemo.config import PredictorConfig, SparsityConfig
from lemo.memory import PeakTracker
from lemo.models import get_runtime
from lemo.models.calibration import BRANCHES
from lemo.models.device import choose_device
from lemo.models.watching import BranchCall, watch
from lemo.selection.layout import build_layout
from lemo.selection.predictor import KINDS, predicted_scores
from lemo.selection.scores import select_by_score
from lemo.training.summary import versions

REPEATS = 5
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
    selection = config.attention_selection
    assert selection is not None

    def choose() -> None:
        for branch, predictor in predictors.items():
            score = predicted_scores(predictor, seen[branch], layout, False)
            select_by_score(score, layout, selection, 0)

    def forward() -> None:
        layer(hidden, position_embeddings=rotary, attention_mask=None)

    return [_row("dense forward of a layer", shape, T, forward, device), _row("choice", shape, T, choose, device)]


def _row(name: str, shape: str, T: int, run: Callable[[], None], device: str) -> Record:
    with timed(device):
        run()
    tracker = PeakTracker(device)
    held = torch.cuda.memory_allocated() if device != "cpu" else 0
    times = []
    for _ in range(REPEATS):
        with timed(device) as seconds:
            run()
        times.append(1000 * seconds[0])
    row = Record(
        bench="op",
        method="lemo-forward",
        shape=shape,
        T=T,
        batch=1,
        setting=f"prediction: {name}",
        steps=REPEATS,
        versions=versions(),
    )
    row.step_ms, row.step_ms_min, row.step_ms_max = statistics.median(times), min(times), max(times)
    row.peak_gib = tracker.read().peak_gib
    row.details = {"above_what_was_held_gib": row.peak_gib - held / 2**30 if device != "cpu" else None}
    return row


if __name__ == "__main__":
    shape, tokens, file = sys.argv[1:]
    rows = measure(shape, int(tokens))
    for row in rows:
        print(f"{row.setting}: {row.step_ms:.2f} ms, peak {row.peak_gib:.2f} GiB")
    records.write(rows, Path(file))
