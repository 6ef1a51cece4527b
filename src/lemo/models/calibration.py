"""A calibration: what `forward` mode needs to know of a model, made by `lemo calibrate`, and how a model takes it up.

A directory of two files: `calibration.json`, facts and thresholds, and `calibration.safetensors`, the predictors'
matrices and the bypasses. It belongs to one model in one dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lemo.config import BranchSelection, Score, SparsityConfig
from lemo.config_io import CALIBRATION_FACTS
from lemo.selection.following import FollowingThresholds
from lemo.selection.predictor import Predictor, activity_predictor_of
from lemo.selection.score_heads import heads_of
from lemo.sparse.bypass import Bypass
from lemo.types import Key

FORMAT = 4
FACTS_FILE = CALIBRATION_FACTS
TENSORS_FILE = "calibration.safetensors"
# Scores predicted and exact, for the report alone.
EXAMPLE_FILE = "example.safetensors"
Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")


class BranchFacts(BaseModel):
    """One branch, a number a layer.

    Attributes:
        thresholds: smallest score that is kept; 0 keeps everything.
        keep: share of the blocks these keep on the sample judged.
        cost: rise of the loss (nats) on that sample where half of the branch's blocks are left out and nothing else.
        recall: share of the blocks with the highest exact scores, half of all, that the predictor ranks as high.
        recall_kept: the same of as many as `keep`.
        size: numbers in the predictor's matrices; `first_size` before it shrank.
        explained: share of the branch's variance that its bypass explains; None without bypass.
    """

    model_config = ConfigDict(extra="forbid")

    thresholds: list[float]
    keep: list[float]
    cost: list[float]
    recall: list[float]
    recall_kept: list[float]
    size: list[int]
    first_size: list[int]
    explained: list[float] | None


class Facts(BaseModel):
    """`calibration.json`.

    Attributes:
        format: of the two files.
        lemo: version that wrote them.
        model, dtype, fingerprint: what was calibrated.
        data: fingerprint of the sequences; `tokens` of them fitted, `judged_tokens` judged.
        block_size, score: as in `SparsityConfig`.
        dense_share: of the training passes that are to run dense.
        average_keep: over both branches of all layers, on the sample judged, dense passes counted.
        loss_dense, loss_sparse: on that sample, nats a token.
        settings: resolved configuration of the calibration.
        seconds: how long it took.
    """

    model_config = ConfigDict(extra="forbid")

    format: int
    lemo: str
    model: str
    dtype: str
    fingerprint: str
    data: str
    tokens: int
    judged_tokens: int
    block_size: int = Field(ge=1)
    score: Score
    dense_share: float
    average_keep: float
    loss_dense: float
    loss_sparse: float
    loss_uniform: float | None
    branches: dict[Branch, BranchFacts]
    settings: dict[str, Any]
    seconds: float

    def headline(self) -> str:
        """One line on what came out."""
        uniform = "" if self.loss_uniform is None else f", {self.loss_uniform:.4f} with the same keep everywhere"
        dense = "" if not self.dense_share else f" with {self.dense_share:.0%} of the passes dense"
        return (
            f"average keep {self.average_keep:.3f}{dense}: held-out loss {self.loss_dense:.4f} dense, "
            f"{self.loss_sparse:.4f} sparse{uniform}"
        )


@dataclass(frozen=True)
class Calibration:
    """What the directory holds; `predictors` and `bypasses` by (layer, branch), on the CPU."""

    facts: Facts
    predictors: dict[Key, Predictor]
    bypasses: dict[Key, Bypass]


def fingerprint(layers: Iterable[nn.Module], embedding: nn.Module) -> str:
    """A hash of a model's norms and of its first embeddings, which neither LoRA nor quantisation changes.

    The same for copies in fp32 and bf16.
    """
    digest = hashlib.sha256()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 and name.endswith("norm.weight"):
                digest.update(_bytes(parameter))
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    digest.update(f"{tuple(weight.shape)}".encode())
    digest.update(_bytes(weight[:64].flatten()))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def read_calibration(directory: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        ValueError: no such directory, a file missing or damaged, or another version's format.
    """
    facts_path, tensors_path = directory / FACTS_FILE, directory / TENSORS_FILE
    if not facts_path.is_file():
        raise ValueError(
            f"calibration {directory} holds no {FACTS_FILE}; give the directory that `lemo calibrate --output` wrote"
            + (", or go on with it: it isn't finished" if directory.is_dir() and any(directory.iterdir()) else "")
        )
    try:
        values = json.loads(facts_path.read_text(encoding="utf-8"))
        version = values.get("format") if isinstance(values, dict) else None
        if version != FORMAT:
            raise ValueError(f"calibration {directory} has format {version}, this lemo reads {FORMAT}; calibrate again")
        facts = Facts.model_validate(values)
        tensors = load_file(tensors_path)
        layers = [(branch, len(found.thresholds)) for branch, found in facts.branches.items()]
        predictors = predictors_of([(i, branch) for branch, count in layers for i in range(count)], tensors)
        bypasses = bypasses_of(tensors)
    except (OSError, json.JSONDecodeError, ValidationError, SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"calibration {directory} is damaged ({reason}); calibrate again") from error
    return Calibration(facts, predictors, bypasses)


def tensors_of(predictors: Mapping[Key, Predictor], bypasses: Mapping[Key, Bypass]) -> dict[str, Tensor]:
    """What `calibration.safetensors` holds."""
    found = {}
    for (layer, branch), predictor in predictors.items():
        for name, tensor in predictor.state_dict().items():
            found[f"{layer}.{branch}.predictor.{name}"] = tensor.detach().cpu().contiguous()
    for (layer, branch), bypass in bypasses.items():
        for name in ("a", "b", "bias"):
            found[f"{layer}.{branch}.bypass.{name}"] = getattr(bypass, name).detach().cpu().contiguous()
    return found


def predictors_of(keys: Iterable[Key], tensors: Mapping[str, Tensor]) -> dict[Key, Predictor]:
    """Predictors from `tensors_of`, of those layers and branches.

    Raises:
        KeyError, RuntimeError: the tensors aren't those of such predictors.
    """
    found: dict[Key, Predictor] = {}
    for layer, branch in keys:
        prefix = f"{layer}.{branch}.predictor."
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        found[layer, branch] = heads_of(state) if branch == "attention" else activity_predictor_of(state)
    return found


def bypasses_of(tensors: Mapping[str, Tensor]) -> dict[Key, Bypass]:
    """Bypasses from `tensors_of`.

    Raises:
        KeyError: a matrix is missing.
    """
    found = {}
    for name, a in tensors.items():
        if name.endswith(".bypass.a"):
            prefix = name.removesuffix("a")
            layer, branch = name.split(".")[:2]
            found[int(layer), branch] = Bypass(a, tensors[prefix + "b"], tensors[prefix + "bias"])
    return found


def fill_in(config: SparsityConfig, calibration: Calibration) -> SparsityConfig:
    """The configuration with a calibration's block size, score and, unless it says what to keep, thresholds and dense
    share.

    Raises:
        ValueError: it asks for another block size or score than was calibrated, or for a keep with causal scores.
    """
    facts = calibration.facts
    if config.block_size not in (None, facts.block_size):
        raise ValueError(
            f"sparsity.block_size is {config.block_size}, but {config.calibration} was calibrated for blocks of "
            f"{facts.block_size}; leave block_size out, or calibrate again"
        )
    if config.score not in (None, facts.score):
        raise ValueError(
            f"sparsity.score is {config.score}, but {config.calibration} was calibrated for {facts.score}; set "
            f"sparsity.score={facts.score}, or calibrate again"
        )
    own = _own_selections(config)
    if facts.score == "causal" and any(selection.keep for selection in own):
        raise ValueError(
            f"{config.calibration} was calibrated for causal scores, which need thresholds: a keep (top-k) looks ahead "
            "by itself; leave keep out, or calibrate again for this keep"
        )
    changes: dict[str, Any] = {"block_size": facts.block_size, "score": facts.score}
    if config.train_bypass is None:
        changes["train_bypass"] = bool(calibration.bypasses)
    if not own:
        if config.dense_share is None:
            changes["dense_share"] = facts.dense_share
        changes |= {
            branch: BranchSelection(threshold=tuple(found.thresholds)) for branch, found in facts.branches.items()
        }
    return config.model_copy(update=changes)


def _own_selections(config: SparsityConfig) -> list[BranchSelection]:
    """What the configuration itself says to keep; the calibration's thresholds choose if that is nothing."""
    return [found for found in (config.attention_selection, config.mlp_selection) if found is not None]


def following_of(config: SparsityConfig, calibration: Calibration) -> FollowingThresholds | None:
    """A calibration's thresholds, if it is they that choose; `config` before `fill_in`."""
    if _own_selections(config):
        return None
    branches = calibration.facts.branches.items()
    return FollowingThresholds(
        {(layer, branch): x for branch, found in branches for layer, x in enumerate(found.thresholds)},
        {(layer, branch): x for branch, found in branches for layer, x in enumerate(found.keep)},
    )


def check_model(calibration: Path, facts: Facts, found: str, dtype: torch.dtype, layers: int) -> None:
    """Refuses another model's calibration.

    Args:
        calibration: directory, for messages.
        facts: its facts.
        found: the model's `fingerprint`.
        dtype: of its weights.
        layers: how many it has.

    Raises:
        ValueError: it isn't this model's, or not in this dtype.
    """
    if any(len(branch.thresholds) != layers for branch in facts.branches.values()) or facts.fingerprint != found:
        raise ValueError(f"{calibration} was calibrated for another model ({facts.model}); calibrate this one")
    name = str(dtype).removeprefix("torch.")
    if facts.dtype != name:
        raise ValueError(
            f"{calibration} was calibrated in {facts.dtype}, this model is in {name}; set model.dtype={facts.dtype}, "
            "or calibrate again"
        )
