"""`lemo bench step`: what a training step costs, by method, model shape and length; one record a row.

A step is a forward, a backward and an optimizer step of one sequence. All rows are measured in one process, each on a
model made anew with the same random weights. A row that doesn't fit the device is a row without a time.
After each row all rows are written anew, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import lemo
from lemo.bench import records
from lemo.bench.baselines import shift_attention
from lemo.bench.config import GROUPS
from lemo.bench.cost import (
    TERA,
    attended_work,
    causal_work,
    grouped_work,
    kept_work,
    matmul_ceiling,
    part_flop,
    step_flop,
)
from lemo.bench.cost_memory import moved_bytes, stored_bytes
from lemo.bench.liger import check_liger, liger_kernels
from lemo.bench.parts import time_parts
from lemo.bench.placements import read_placements
from lemo.bench.records import Record
from lemo.bench.shapes import Widths, build_shape, full_depth
from lemo.bench.step_config import StepConfig, StepMethod, load_step
from lemo.bench.timing import free_memory, timed
from lemo.bench.trl_step import check_trl, trl_steps
from lemo.config import RunConfig, SparsityConfig, TrainingConfig
from lemo.config_io import SAVED_CONFIG, save_resolved
from lemo.data.labelling import IGNORED
from lemo.errors import UserError
from lemo.memory import PeakTracker
from lemo.memory.tracker import GIB
from lemo.models import get_runtime
from lemo.models.device import choose_device
from lemo.selection.placement import place_blocks
from lemo.selection.predictor import ActivityPredictor, Predictor
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.score_heads import random_heads
from lemo.sparse.parts import part
from lemo.training.directory import refuse_used
from lemo.training.job import prepare_model
from lemo.training.storage import storage_errors
from lemo.training.summary import versions
from lemo.types import SequenceLayout, StepStats


@dataclass(frozen=True)
class Place:
    """A model's shape with so many layers, and a length."""

    shape: str
    layers: int
    T: int


@dataclass(frozen=True)
class Measured:
    """Steps of one row; seconds, GiB, milliseconds.

    Attributes:
        keep, mlp_keep: means over layers and branches, and over MLPs alone; `attention_keep` over attention alone.
        density: of the forward's causal attention, None where queries see everything.
        work: share of the causal attention work, as `lemo.bench.cost` says.
    """

    step_s: tuple[float, ...]
    keep: float
    attention_keep: float
    mlp_keep: float
    fidelity: float | None
    density: float | None
    work: float
    peak_gib: float
    peak_reserved_gib: float | None
    weights_gib: float | None
    parts_ms: dict[str, float] | None


def run_steps(config: StepConfig, *, resume: bool = False) -> list[Record]:
    """Measures what the output directory doesn't hold yet.

    Args:
        config: what is measured. `config.output` must be absent or empty, unless `resume`.
        resume: go on in the directory; all but shapes, lengths and methods must be as it was.

    Returns:
        All rows.

    Raises:
        UserError: anything the user can fix, before any work.
    """
    console = Console(stderr=True)
    directory = Path(config.output)
    device = choose_device(config.device)
    for method in config.methods:
        if method.trl:
            check_trl()
        if method.liger:
            check_liger(device, method.method)
    if config.placements is not None:
        read_placements(Path(config.placements))
    for method in config.methods:
        densities(config, method, 1)
    rows: list[Record] = []
    if resume:
        rows = open_benchmark(config, directory)
    else:
        refuse_used(directory, "go on with the benchmark in it")
    with storage_errors("the benchmark", directory, "choose another --output"):
        directory.mkdir(parents=True, exist_ok=True)
        save_resolved(config, directory / SAVED_CONFIG)
    ceiling = matmul_ceiling(device, getattr(torch, config.dtype))
    for place in places(config):
        missing = [method for method in config.methods if not _holds(rows, place, method)]
        for method, measured in measure(config, place, missing, device):
            row = record(config, place, method, measured, ceiling)
            rows.append(row)
            records.write(rows, directory / records.FILE)
            told = "out of memory" if measured is None else f"{row.step_ms:,.0f} ms, {measured.peak_gib:.2f} GiB"
            name = f"{place.shape}, {place.layers} layers, {place.T:,} tokens: {method.method} {method.setting}"
            console.print(f"{name}: {told}", highlight=False, soft_wrap=True)
    return rows


def open_benchmark(config: StepConfig, directory: Path) -> list[Record]:
    """The rows that are there.

    Raises:
        UserError: no benchmark, or one measured in another way.
    """
    saved = records.saved_config(directory, "benchmark")
    if saved is None:
        return []
    old = load_step(saved)
    fixed = ("labels", "placements", "warm_up", "repeats", "parts", "lora", "dtype")
    changed = [name for name in fixed if getattr(old, name) != getattr(config, name)]
    before = {(m.method, m.setting): m for m in old.methods}
    changed += [f"{m.method} {m.setting}" for m in config.methods if before.get((m.method, m.setting), m) != m]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)} differ from the benchmark in {directory} ({saved.name}), so its rows "
            "can't be compared with new ones; choose another --output, or give changed methods another setting"
        )
    return records.read_saved(directory)


def places(config: StepConfig) -> list[Place]:
    """Shapes and lengths in the order given."""
    return [
        Place(shape.name, shape.layers or full_depth(shape.name), T)
        for shape in config.shapes
        for T in shape.lengths or config.lengths
    ]


def measure(
    config: StepConfig, place: Place, methods: list[StepMethod], device: str
) -> Iterator[tuple[StepMethod, Measured | None]]:
    """Each method's steps at one place; None where they don't fit the device's memory."""
    for method in methods:
        try:
            measured = _measure(config, place, method, device)
        except torch.OutOfMemoryError:
            measured = None
        free_memory(device)
        yield method, measured


def _measure(config: StepConfig, place: Place, method: StepMethod, device: str) -> Measured:
    if method.trl:
        return _steps_of_trl(config, place, method, device)
    model = wrapped(config, place, method, device)
    with liger_kernels(model.get_base_model()) if method.liger else nullcontext():
        return _steps(config, place, method, model, device)


def _steps_of_trl(config: StepConfig, place: Place, method: StepMethod, device: str) -> Measured:
    model = _base(config, place, device)
    batch = sequence(place.T, model.config.vocab_size, config.labelled(place.T), "cpu")
    counts = {"warm_up": config.warm_up, "repeats": config.repeats}
    steps = trl_steps(model, batch, config.lora, device, **counts, liger=method.liger)
    peak = steps.peak
    return Measured(
        steps.seconds, 1.0, 1.0, 1.0, None, None, 1.0, peak.peak_gib, peak.peak_reserved_gib, steps.weights_gib, None
    )


def _steps(config: StepConfig, place: Place, method: StepMethod, model: Any, device: str) -> Measured:
    # None with transformers' own loss.
    runtime: Any = get_runtime(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = sequence(place.T, model.config.vocab_size, config.labelled(place.T), device)
    tracker = PeakTracker(device)
    seconds = []

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for number in range(config.warm_up + config.repeats):
        if number == config.warm_up:
            tracker.reset()
            if runtime is not None:
                runtime.collect()
        with timed(device) as timer:
            step()
        if number >= config.warm_up:
            seconds.append(timer[0])
    peak = tracker.read()
    stats = StepStats((), ()) if runtime is None else runtime.collect()
    plans = {} if runtime is None else runtime.last_plans
    if runtime is not None and runtime.last_grids:
        work = attended_work(plans, runtime.last_grids, place.T)
    elif method.forward:
        work = kept_work([plan for (_, branch), plan in plans.items() if branch == "attention"], place.T)
    else:
        work = causal_work(plans.values(), place.T)
    attention, mlp = zip(*stats.keep, strict=True) if stats.keep else ((1.0,), (1.0,))
    return Measured(
        tuple(seconds),
        stats.keep_mean,
        statistics.mean(attention),
        statistics.mean(mlp),
        stats.fidelity_mean,
        grouped_work(method.groups or GROUPS) if method.longlora else stats.density,
        work,
        peak.peak_gib,
        peak.peak_reserved_gib,
        # A CPU's peak is that of the whole process, from which nothing can be taken.
        weights / GIB if device != "cpu" else None,
        time_parts(step, device) if config.parts else None,
    )


def wrapped(config: StepConfig, place: Place, method: StepMethod, device: str) -> Any:
    """A model of the place's shape with a LoRA adapter, as `lemo finetune` would train it with the method."""
    base = _base(config, place, device)
    run = RunConfig(
        lora=config.lora,
        sparsity=method.sparsity or SparsityConfig(mode="dense"),
        training=TrainingConfig(gradient_checkpointing=method.checkpointed),
    )
    model = prepare_model(base, run)
    model.train()
    if method.method == "lora+logits":
        return lemo.restore(model)
    if method.longlora:
        shift_attention(model, method.groups or GROUPS)
    runtime: Any = get_runtime(model)
    if method.forward:
        runtime.predictors = random_predictors(place.shape, place.layers, device)
    if method.keep is not None:
        keep, density = method.keep, densities(config, method, place.layers)
        # Every step has the same blocks; placing them isn't a step's work.
        placed: dict[int, Tensor] = {}

        def place_once(layout: SequenceLayout, labelled: Tensor, layer: int) -> Tensor:
            if layer not in placed:
                placed[layer] = place_blocks(layout, labelled, keep, density[layer]).cpu()
            return placed[layer]

        runtime.placement = place_once
    return model


def _base(config: StepConfig, place: Place, device: str) -> Any:
    torch.manual_seed(0)
    return build_shape(place.shape, place.layers, place.T, getattr(torch, config.dtype), device)


def random_predictors(shape: str, layers: int, device: str) -> dict[tuple[int, str], Predictor]:
    """Predictors of both branches of every layer; what they predict means nothing. Attention's are as large as layers'
    are on average after they have shrunk, MLPs' as before."""
    widths, config = Widths.of(shape), PredictorConfig()
    averages = config.heads_left(widths.d, widths.A // widths.d)
    found: dict[tuple[int, str], Predictor] = {}
    for layer in range(layers):
        heads, keys = (int((layer + 1) * average) - int(layer * average) for average in averages)
        found[layer, "attention"] = random_heads(heads, keys, widths.d, widths.D)
        found[layer, "mlp"] = ActivityPredictor(widths.D, config.widths)
    return {key: predictor.to(device).requires_grad_(False) for key, predictor in found.items()}


def densities(config: StepConfig, method: StepMethod, layers: int) -> list[list[float]]:
    """For each layer, how densely the method's kept blocks lie along the sequence; even unless recorded.

    Raises:
        UserError: the recording can't be used.
    """
    if method.placement != "recorded" or method.keep is None or config.placements is None:
        return [[1.0]] * layers
    return read_placements(Path(config.placements)).for_layers(method.keep, layers)


def sequence(T: int, vocabulary: int, labels: int, device: str) -> dict[str, Tensor]:
    """One sequence of random tokens, [1, T], of which the last `labels` are labelled."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, T), generator=generator)
    labelled = tokens.clone()
    labelled[:, : T - labels] = IGNORED
    return {"input_ids": tokens.to(device), "labels": labelled.to(device)}


def record(
    config: StepConfig, place: Place, method: StepMethod, measured: Measured | None, ceiling: float | None
) -> Record:
    """A row.

    `details`: `layers` it has and `full_depth`; `weights_gib`; `out_of_memory`; `labels`; `tflop` of the step by
    `lemo.bench.cost`, and `ceiling_tflop_per_s` of the device's matrix products; `stored_gib` and `moved_gb` by
    `lemo.bench.cost_memory`; with `parts`, `parts_ms` of one step, and of `lemo-backward`, alone or with `attend`,
    `parts_tflop`.
    """
    row = Record(
        bench="step",
        method=method.method,
        shape=place.shape,
        task="lm" if config.labels == "all" else "sft",
        T=place.T,
        batch=1,
        setting=method.setting,
        steps=config.repeats,
        versions=versions(*method.packages),
        concurrent=1,
    )
    row.commit = config.commit or row.commit
    row.details = {
        "layers": place.layers,
        "full_depth": full_depth(place.shape),
        "labels": config.labelled(place.T),
        "weights_gib": measured.weights_gib if measured else None,
        "out_of_memory": measured is None,
        "tflop": None,
        "ceiling_tflop_per_s": ceiling / TERA if ceiling else None,
    }
    if measured is not None:
        milliseconds = [1000 * s for s in measured.step_s]
        row.step_ms = statistics.median(milliseconds)
        row.step_ms_min, row.step_ms_max = min(milliseconds), max(milliseconds)
        row.tokens_per_s = 1000 * place.T / row.step_ms
        row.keep, row.fidelity, row.density = measured.keep, measured.fidelity, measured.density
        density = 1.0 if measured.density is None else measured.density
        sizes, labels, keeps = (place.shape, place.layers, place.T), config.labelled(place.T), (1.0, 1.0)
        if method.forward:
            keeps = measured.attention_keep, measured.mlp_keep
        keep = keeps[0] if method.forward else measured.keep
        cost = step_flop(*sizes, labels, method.method, keep, measured.work, keeps[1], density)
        row.details["tflop"] = cost / TERA
        row.details["stored_gib"] = stored_bytes(*sizes, method.method, config.lora.targets, *keeps) / GIB
        if not method.method.startswith("lemo-backward"):
            row.details["moved_gb"] = moved_bytes(*sizes, method.method, *keeps) / 1e9
        row.peak_gib, row.peak_reserved_gib = measured.peak_gib, measured.peak_reserved_gib
        if measured.parts_ms is not None:
            row.details["parts_ms"] = measured.parts_ms
        if measured.parts_ms is not None and method.method.startswith("lemo-backward"):
            flop = part_flop(*sizes, labels, measured.keep, measured.work, density)
            row.details["parts_tflop"] = {name: value / TERA for name, value in flop.items()}
    return row


def _holds(rows: list[Record], place: Place, method: StepMethod) -> bool:
    wanted = (place.shape, place.layers, place.T, method.method, method.setting, records.device_name())
    return any((r.shape, (r.details or {}).get("layers"), r.T, r.method, r.setting, r.gpu) == wanted for r in rows)
