"""What cuDNN's plans cost where every sequence has a new length: steps of SmolLM2-135M's shape with cuDNN and without.

`python -m benchmarks.record_plans FILE.jsonl`, on a GPU; 16 lengths of 2K to 16K tokens, 512 labels, the same for all.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from lemo.bench import records
from lemo.bench.records import Record
from lemo.bench.shapes import build_shape, full_depth
from lemo.bench.timing import timed
from lemo.config import RunConfig, SparsityConfig, TrainingConfig
from lemo.data.labelling import IGNORED
from lemo.training.job import prepare_model
from lemo.training.summary import versions

SHAPE = "smollm2-135m"
LONGEST, LABELS, STEPS, WARM_UP = 16384, 512, 16, 3
METHODS = {"lora+ckpt": SparsityConfig(mode="dense"), "lemo-backward": SparsityConfig()}


def measure(method: str, cudnn: bool) -> Record:
    """One row: the median step over the lengths."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.manual_seed(0)
    base = build_shape(SHAPE, full_depth(SHAPE), LONGEST, torch.bfloat16, "cuda")
    model: Any = prepare_model(base, RunConfig(sparsity=METHODS[method], training=TrainingConfig()))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    lengths = random.Random(0)
    times = []
    for _ in range(STEPS):
        ids = torch.randint(base.config.vocab_size, (1, lengths.randrange(LONGEST // 8, LONGEST)), device="cuda")
        labels = ids.clone()
        labels[:, :-LABELS] = IGNORED
        with timed("cuda") as seconds:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        times.append(1000 * seconds[0])
    row = Record(
        bench="op",
        method=method,
        shape=SHAPE,
        T=LONGEST,
        batch=1,
        setting=f"every length new, cuDNN {'on' if cudnn else 'off'}",
        steps=STEPS - WARM_UP,
        versions=versions(),
    )
    times = times[WARM_UP:]
    row.step_ms, row.step_ms_min, row.step_ms_max = statistics.median(times), min(times), max(times)
    print(f"{method}, {row.setting}: {row.step_ms:.0f} ms ({row.step_ms_min:.0f} to {row.step_ms_max:.0f})", flush=True)
    return row


if __name__ == "__main__":
    records.write([measure(method, cudnn) for method in METHODS for cudnn in (True, False)], Path(sys.argv[1]))
