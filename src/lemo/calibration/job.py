"""One calibration, from the model to the directory that `SparsityConfig(calibration=...)` names.

Three phases, each of which leaves its result behind, so that an interrupted calibration goes on: predictors and
bypasses are fitted (begun anew if it was cut off), losses with blocks left out are measured one by one, and the
calibration is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from rich.console import Console
from safetensors.torch import save_file

import lemo
from lemo.calibration.allocation import LEVELS, algorithm1, by_curves
from lemo.calibration.config import CalibrationConfig, load_calibration
from lemo.calibration.fitting import Fitted
from lemo.calibration.judging import Judge, Scored
from lemo.calibration.stored import LEDGER, fingerprint_of, forget, take_or_fit
from lemo.config import BranchSelection, RunConfig, SparsityConfig
from lemo.config_io import SAVED_CONFIG, save_resolved
from lemo.data import Collator
from lemo.data.loading import load
from lemo.errors import UserError
from lemo.models import get_runtime
from lemo.models.calibration import (
    BRANCHES,
    EXAMPLE_FILE,
    FACTS_FILE,
    FORMAT,
    TENSORS_FILE,
    BranchFacts,
    Calibration,
    Facts,
    read_calibration,
    tensors_of,
)
from lemo.models.device import choose_device
from lemo.models.loading import load_model
from lemo.models.surgery import hold_bypasses
from lemo.training.checks import check_length, fingerprint_data
from lemo.training.directory import refuse_used
from lemo.training.storage import storage_errors, sync_directory, sync_file, write_json
from lemo.types import Key

_SETTLING = 8


def calibrate(config: CalibrationConfig, *, resume: bool = False) -> Calibration:
    """Fits, judges and writes a calibration.

    Args:
        config: what is calibrated. `config.output` must be absent or empty, unless `resume`.
        resume: go on in the directory; all settings must be as they were.

    Returns:
        What was written.

    Raises:
        UserError: anything the user can fix.
    """
    started = time.perf_counter()
    console = Console(stderr=True)
    directory = Path(config.output)
    if resume:
        _refuse_changed(config, directory)
        if (directory / FACTS_FILE).is_file():
            console.print("the calibration is finished; nothing is left to do")
            return read_calibration(directory)
    else:
        refuse_used(directory, "go on with the calibration in it")
    device = choose_device(config.device)
    model, tokenizer = load_model(config.model, device)
    check_length(model, RunConfig(model=config.model, data=config.data))
    data = load(config.data, tokenizer, config.seed)
    console.print(data.report.render())
    train, heldout = _first(data.train, config.fit_sequences), _first(data.heldout, config.judge_sequences)
    _refuse_short([*train["input_ids"], *heldout["input_ids"]], config)
    identity = fingerprint_data(train) + fingerprint_data(heldout)
    with storage_errors("the calibration", directory, "choose another --output"):
        directory.mkdir(parents=True, exist_ok=True)
        save_resolved(config, directory / SAVED_CONFIG)
    try:
        everything = BranchSelection(threshold=0.0)
        sparsity = SparsityConfig(
            mode="forward", block_size=config.block_size, score=config.score, attention=everything, mlp=everything
        )
        lemo.sparsify(model, sparsity)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    model.eval()
    with storage_errors("the calibration", directory, "free some space, then go on with --resume"):
        fitted = take_or_fit(model, train, identity, config, console, directory)
        runtime = get_runtime(model)
        assert runtime is not None
        runtime.predictors = fitted.predictors
        hold_bypasses(model, fitted.bypasses)
        judge = Judge(
            model,
            heldout,
            Collator.for_tokenizer(tokenizer),
            block_size=config.block_size,
            score=config.score,
            device=device,
            max_tokens=config.data.max_tokens,
            ledger=directory / LEDGER,
        )
        shares, costs = _allocate(judge, config, console)
        facts = _facts(model, judge, fitted, shares, costs, config)
        facts.data, facts.tokens = identity, sum(map(len, train["input_ids"]))
        facts.seconds = time.perf_counter() - started
        _write(directory, facts, fitted, judge.scored())
    return read_calibration(directory)


# ---- Before any work ----


def _refuse_changed(config: CalibrationConfig, directory: Path) -> None:
    saved = directory / SAVED_CONFIG
    if not saved.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"--output {directory} holds no calibration to resume; choose another --output")
        return
    try:
        old = load_calibration(saved).model_dump(exclude={"output", "device"})
    except UserError as error:
        raise UserError(
            f"--resume: the settings in {saved} aren't this version's ({error}); choose another --output"
        ) from error
    new = config.model_dump(exclude={"output", "device"})
    changed = [name for name in new if old[name] != new[name]]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)} differ from the calibration in {directory} ({saved.name}); choose another "
            "--output"
        )


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def _refuse_short(sequences: list[list[int]], config: CalibrationConfig) -> None:
    least = 4 * config.block_size
    longest = max(map(len, sequences), default=0)
    if longest < least:
        raise UserError(
            f"the longest sequence has {longest} tokens, under four blocks of {config.block_size}: there is nothing to "
            "choose from; lower block_size, or calibrate on longer documents"
        )


# ---- Shares and thresholds ----


def _allocate(
    judge: Judge, config: CalibrationConfig, console: Console
) -> tuple[dict[Key, float], dict[Key, dict[float, float]]]:
    """The shares to keep, and what was measured for them: unit -> share -> rise of the loss."""
    units = sorted(judge.scored().score)
    dense = fmean(judge.losses({}))
    costs: dict[Key, dict[float, float]] = {unit: {} for unit in units}
    for number, unit in enumerate(units, start=1):
        for level in LEVELS if config.allocation == "curves" else (0.5,):
            costs[unit][level] = fmean(judge.losses({unit: level})) - dense
        if number % 10 == 0 or number == len(units):
            console.print(f"cost of {number} of {len(units)} branches measured", highlight=False)
    if config.allocation == "uniform" and config.loss_tolerance is None:
        return dict.fromkeys(units, config.keep_of_unit), costs
    if config.allocation == "algorithm1":
        return algorithm1(_over_mean(judge.scored()), config.keep_of_unit, judge.losses), costs
    if config.loss_tolerance is None:
        return by_curves(costs, config.keep_of_unit), costs
    return _within(config.loss_tolerance, judge, costs, dense, config), costs


def _over_mean(scored: Scored) -> dict[Key, float]:
    """Share of blocks over the mean score (the paper's first thresholds)."""
    return {unit: float((score >= score.mean()).float().mean()) for unit, score in scored.score.items()}


def _settle(judge: Judge, shares: dict[Key, float]) -> dict[Key, float]:
    """Thresholds that keep the shares while every other unit leaves blocks out too.

    What lower layers leave out moves the scores above, so what a unit keeps is measured and its threshold corrected.
    """
    wanted, best, least = dict(shares), {}, math.inf
    for _ in range(_SETTLING):
        thresholds = judge.thresholds(wanted)
        _, kept = judge.measure(thresholds)
        miss = {unit: kept[unit] - share for unit, share in shares.items() if share < 1}
        missed = sum(map(abs, miss.values())) + abs(sum(miss.values()))
        if missed < least:
            best, least = thresholds, missed
        wanted |= {unit: min(0.999, max(0.01, wanted[unit] - value)) for unit, value in miss.items()}
    return best


def _within(
    tolerance: float, judge: Judge, costs: dict[Key, dict[float, float]], dense: float, config: CalibrationConfig
) -> dict[Key, float]:
    """The smallest average whose loss, measured with all units at once, stays within the tolerance; by bisection."""
    units = list(costs)

    def shares(keep: float) -> dict[Key, float]:
        return dict.fromkeys(units, keep) if config.allocation == "uniform" else by_curves(costs, keep)

    low, high = min(LEVELS), 1.0
    for _ in range(7):
        middle = (low + high) / 2
        losses, _ = judge.measure(_settle(judge, shares(middle)))
        if fmean(losses) - dense <= tolerance:
            high = middle
        else:
            low = middle
    return shares(high)


# ---- The result ----


def _facts(
    model: Any,
    judge: Judge,
    fitted: Fitted,
    shares: dict[Key, float],
    costs: dict[Key, dict[float, float]],
    config: CalibrationConfig,
) -> Facts:
    thresholds = _settle(judge, shares)
    losses, kept = judge.measure(thresholds)
    layers, dense = judge.runtime.layers, config.share_of_dense_passes
    uniform = None
    if config.allocation != "uniform":
        average = sum(shares.values()) / len(shares)
        uniform = fmean(judge.losses(dict.fromkeys(shares, average)))
    scored = judge.scored()
    half_recall, kept_recall = scored.recall(dict.fromkeys(kept, 0.5)), scored.recall(kept)

    def column(values: Mapping[Key, Any], branch: str) -> list[Any]:
        return [values[layer, branch] for layer in range(layers)]

    sizes = {key: predictor.size for key, predictor in fitted.predictors.items()}
    half = {unit: curve[0.5] for unit, curve in costs.items()}
    branches = {
        branch: BranchFacts(
            thresholds=column(thresholds, branch),
            keep=column(kept, branch),
            cost=column(half, branch),
            recall=column(half_recall, branch),
            recall_kept=column(kept_recall, branch),
            size=column(sizes, branch),
            first_size=column(fitted.first_size, branch),
            explained=column(fitted.explained, branch) if fitted.explained else None,
        )
        for branch in BRANCHES
        if any(unit[1] == branch for unit in shares)
    }
    return Facts(
        format=FORMAT,
        lemo=lemo.__version__,
        model=config.model.name,
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint_of(model),
        data="",
        tokens=0,
        judged_tokens=int(scored.tokens.sum()),
        block_size=config.block_size,
        score=config.score,
        dense_share=dense,
        average_keep=dense + (1 - dense) * (1 - sum(1 - share for share in kept.values()) / (2 * layers)),
        loss_dense=fmean(judge.losses({})),
        loss_sparse=fmean(losses),
        loss_uniform=uniform,
        branches=branches,
        settings=config.model_dump(mode="json"),
        seconds=0.0,
    )


def _write(directory: Path, facts: Facts, fitted: Fitted, scored: Scored) -> None:
    """Everything, the facts last: with them the calibration is whole."""
    save_file(tensors_of(fitted.predictors, fitted.bypasses), directory / f".tmp-{TENSORS_FILE}")
    (directory / f".tmp-{TENSORS_FILE}").rename(directory / TENSORS_FILE)
    sync_file(directory / TENSORS_FILE)
    pictures = {}
    for (layer, _), (predicted, exact) in scored.example.items():
        pictures[f"{layer}.predicted"] = predicted.half().contiguous()
        pictures[f"{layer}.exact"] = exact.half().contiguous()
    save_file(pictures, directory / EXAMPLE_FILE)
    sync_directory(directory)
    write_json(directory / FACTS_FILE, facts.model_dump(mode="json"))
    forget(directory)
