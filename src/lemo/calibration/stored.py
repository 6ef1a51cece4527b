"""What has been fitted, on disk: of an interrupted calibration, or of another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from lemo.calibration.config import CalibrationConfig
from lemo.calibration.fitting import Fitted, fit
from lemo.errors import UserError
from lemo.models.architectures import architecture_of
from lemo.models.calibration import (
    BRANCHES,
    FORMAT,
    BranchFacts,
    bypasses_of,
    check_model,
    fingerprint,
    predictors_of,
    read_calibration,
    tensors_of,
)
from lemo.training.storage import sync_file, write_json
from lemo.types import Key

LEDGER = "losses.jsonl"
_FITTED = "fitted"


def take_or_fit(
    model: Any, train: Dataset, identity: str, config: CalibrationConfig, console: Console, directory: Path
) -> Fitted:
    """What an interrupted calibration had fitted, what another one has (`config.reuse`), or a new fit, then stored.

    Raises:
        UserError: what is there doesn't belong to this model, data or configuration.
    """
    facts, tensors = directory / f"{_FITTED}.json", directory / f"{_FITTED}.safetensors"
    device = next(model.parameters()).device
    if config.reuse is not None:
        return _reused(Path(config.reuse), model, identity, config, directory)
    if facts.is_file():
        values = json.loads(facts.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise UserError(f"--resume: another version of lemo began {directory}; choose another --output")
        if values["data"] != identity:
            raise UserError(f"--resume: the data isn't what it was when {directory} was begun; choose another --output")
        return _read_fitted(values, load_file(tensors), device)

    def told(number: int) -> None:
        if number % 8 == 0 or number == len(train):
            console.print(f"fitted to {number} of {len(train)} sequences", highlight=False)

    def stream() -> Iterator[Tensor]:
        for row in train:
            yield torch.tensor(row["input_ids"], device=device)

    fitted = fit(model, stream(), len(train), config, told)
    save_file(tensors_of(fitted.predictors, fitted.bypasses), tensors)
    sync_file(tensors)
    write_json(
        facts,
        {
            "format": FORMAT,
            "data": identity,
            "first_size": _named(fitted.first_size),
            "explained": _named(fitted.explained),
        },
    )
    return fitted


def _reused(earlier: Path, model: Any, identity: str, config: CalibrationConfig, directory: Path) -> Fitted:
    """What another calibration had fitted; its ledger comes along if its losses would be these."""
    try:
        old = read_calibration(earlier)
        check_model(earlier, old.facts, fingerprint_of(model), model.dtype, model.config.num_hidden_layers)
    except ValueError as error:
        raise UserError(f"reuse: {error}") from error
    settings = old.facts.settings
    fixed = ("block_size", "predictor", "seed")
    now = config.model_dump(mode="json")
    changed = [name for name in fixed if settings[name] != now[name]]
    changed += ["score"] if "mass" in {settings["score"], config.score} and settings["score"] != config.score else []
    changed += ["data"] if old.facts.data != identity else []
    changed += ["bypass_rank"] if config.bypass_rank not in (0, settings["bypass_rank"]) else []
    if settings["branches"] not in ("both", config.branches):
        changed.append("branches")
    if changed:
        raise UserError(f"reuse: {', '.join(changed)} differ from the calibration in {earlier}; leave reuse out")
    if (config.bypass_rank, config.score) == (settings["bypass_rank"], settings["score"]):
        ledger = directory / LEDGER
        if not ledger.exists():
            shutil.copyfile(earlier / LEDGER, ledger)
    device = next(model.parameters()).device
    branches = BRANCHES if config.branches == "both" else (config.branches,)
    chosen = [key for key in old.predictors if key[1] in branches]
    facts: dict[str, BranchFacts] = {str(branch): found for branch, found in old.facts.branches.items()}
    return Fitted(
        predictors={key: old.predictors[key].to(device) for key in chosen},
        bypasses={key: old.bypasses[key] for key in chosen} if config.bypass_rank else {},
        first_size={(layer, branch): facts[branch].first_size[layer] for layer, branch in chosen},
        explained={(layer, branch): (facts[branch].explained or [])[layer] for layer, branch in chosen}
        if config.bypass_rank
        else {},
    )


def _named(values: Mapping[Key, Any]) -> dict[str, Any]:
    return {f"{layer}.{branch}": value for (layer, branch), value in values.items()}


def _read_fitted(values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Fitted:
    def keyed(name: str) -> dict[Key, Any]:
        return {(int(key.split(".")[0]), key.split(".")[1]): value for key, value in values[name].items()}

    first_size = keyed("first_size")
    predictors = {key: predictor.to(device) for key, predictor in predictors_of(first_size, tensors).items()}
    return Fitted(predictors, bypasses_of(tensors), first_size, keyed("explained"))


def fingerprint_of(model: Any) -> str:
    """`lemo.models.calibration.fingerprint` of a CausalLM."""
    decoder = model.get_submodule(architecture_of(model.config.model_type).decoder)
    return fingerprint(decoder.layers, model.get_input_embeddings())


def forget(directory: Path) -> None:
    """Deletes what an interrupted calibration would go on from."""
    for path in directory.glob(f"{_FITTED}.*"):
        path.unlink()
