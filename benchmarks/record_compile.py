"""What torch.compile does for the dense forward of `backward` mode: Llama-3-8B's layers, LoRA on all linears.

`python -m benchmarks.record_compile TOKENS FILE.jsonl`, on a GPU. The forward as lemo runs it (row tiles, fused
adapters and norms) with and without its MLP and norms compiled, and transformers' own layers with and without them
compiled whole. Four layers; no gradients, as that forward has none.
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
from lemo.config import RunConfig, SparsityConfig, TrainingConfig
from lemo.memory import PeakTracker
from lemo.training.job import prepare_model
from lemo.training.summary import versions

SHAPE, LAYERS, REPEATS = "llama-3-8b", 4, 5


def compile_parts(model: Any) -> None:
    """MLPs and norms: what lies between the matrix products and attention, which no compiler makes faster."""
    for layer in decoder(model).layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            # An instance's own forward keeps lemo from fusing the adapter, so that the compiler sees it.
            linear.forward = linear.forward
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            module.forward = torch.compile(module.forward, dynamic=False)


def compile_layers(model: Any) -> None:
    """Each layer whole."""
    for layer in decoder(model).layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def decoder(model: Any) -> Any:
    """The transformers decoder inside PEFT's model."""
    return model.get_base_model().model


VARIANTS: dict[str, tuple[bool, Callable[[Any], None] | None]] = {
    "lemo": (True, None),
    "lemo, MLP and norms compiled": (True, compile_parts),
    "transformers": (False, None),
    "transformers, layers compiled": (False, compile_layers),
}


def measure(name: str, tokens: int) -> Record:
    """One row: the median forward, and in `setting` what the first one took."""
    sparse, change = VARIANTS[name]
    torch._dynamo.reset()
    base = build_shape(SHAPE, LAYERS, tokens, torch.bfloat16, "cuda")
    model: Any = prepare_model(base, RunConfig(sparsity=SparsityConfig(), training=TrainingConfig()))
    if not sparse:
        lemo.restore(model)
        model.gradient_checkpointing_disable()
    model.train()
    if change is not None:
        change(model)
    ids = torch.randint(base.config.vocab_size, (1, tokens), device="cuda")
    tracker = PeakTracker("cuda")
    times = []
    for number in range(1 + REPEATS):
        if number == 1:
            tracker.reset()
        with timed("cuda") as seconds, torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            decoder(model)(input_ids=ids, use_cache=False)
        times.append(1000 * seconds[0])
    first, times = times[0], times[1:]
    row = Record(bench="op", method="dense forward", shape=SHAPE, T=tokens, batch=1, steps=REPEATS, versions=versions())
    row.setting = f"{LAYERS} layers, {name}; first call {first / 1000:.1f} s"
    row.step_ms, row.step_ms_min, row.step_ms_max = statistics.median(times), min(times), max(times)
    row.peak_gib = tracker.read().peak_gib
    print(f"{name}: {row.step_ms:.1f} ms ({min(times):.1f} to {max(times):.1f}), first call {first / 1000:.1f} s")
    return row


if __name__ == "__main__":
    records.write([measure(name, int(sys.argv[1])) for name in VARIANTS], Path(sys.argv[2]))
