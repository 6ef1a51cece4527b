"""Configuration of a calibration. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lemo.config import DataConfig, Frozen, ModelConfig, Score, Share
from lemo.config_io import flags, load
from lemo.selection.predictor_config import PredictorConfig

# What passes that leave blocks out keep by default (docs/decisions/0010).
_SPARSE_KEEP = 0.25
# Least share of a branch's blocks that is kept: under an eighth a branch isn't worth its norm.
LEAST = 0.125


class CalibrationConfig(Frozen):
    """One run of `lemo calibrate`: a YAML file plus `--set key=value`.

    Args:
        model: what is calibrated, in the dtype it will be trained in.
        data: a sample like the training data. Predictors and bypasses are fitted to its training part and judged, and
            thresholds chosen, on its held-out part.
        block_size: tokens per block.
        score: as in `SparsityConfig.score`.
        branches: which branches may leave blocks out.
        keep: average share of the blocks kept, over both branches of all layers and all training passes.
        dense_share: share of the training passes that are to run dense; they count in `keep`, so the others leave out
            more. Default: so many that the others keep a quarter; none with `loss_tolerance` or one branch alone.
        loss_tolerance: in place of `keep`: as few blocks as raise the loss on the held-out sample by at most so much
            (nats a token).
        allocation: how keep is shared out among branches and layers. `curves`: from each one's cost at some levels,
            cheapest first. `algorithm1`: the paper's, from mean scores by finite differences of the held-out loss.
            `uniform`: the same everywhere.
        fit_sequences, judge_sequences: at most so many of each part.
        predictor: how predictors are made.
        bypass_rank: of the low-rank bypasses; 0 fits none.
        reuse: directory of a finished calibration of the same model and data: its predictors and bypasses are taken
            over, and what it measured where that still holds, so that another `keep` or `allocation` takes little time.
        seed: of the predictors' initial weights and the order of the data.
        output: directory; must be absent or empty.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    block_size: int = Field(default=64, ge=1)
    score: Score = "paper"
    branches: Literal["both", "attention", "mlp"] = "both"
    keep: Share = 0.75
    dense_share: float | None = Field(default=None, ge=0.0, lt=1.0)
    loss_tolerance: float | None = Field(default=None, gt=0)
    allocation: Literal["curves", "algorithm1", "uniform"] = "curves"
    fit_sequences: int = Field(default=256, ge=1)
    judge_sequences: int = Field(default=8, ge=1)
    predictor: PredictorConfig = PredictorConfig()
    bypass_rank: int = Field(default=64, ge=0)
    reuse: str | None = None
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = "runs/calibration"

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationConfig:
        if self.data.packing:
            raise ValueError("data.packing has no use in a calibration; leave it out")
        if self.loss_tolerance is not None and self.allocation == "algorithm1":
            raise ValueError("allocation algorithm1 needs an average keep; leave loss_tolerance out")
        if self.loss_tolerance is None and self.keep_of_unit < LEAST - 1e-9:
            dense = self.share_of_dense_passes
            remedy = "raise keep, or lower dense_share" if dense else "raise keep"
            raise ValueError(
                f"keep {self.keep:g} can't be reached with {dense:g} of the passes dense and branches {self.branches}: "
                f"a branch keeps {LEAST:g} of its blocks at least; {remedy}"
            )
        return self

    @property
    def share_of_dense_passes(self) -> float:
        """`dense_share` with its default filled in."""
        if self.dense_share is not None:
            return self.dense_share
        if self.branches != "both" or self.loss_tolerance is not None or self.keep == 1.0:
            return 0.0
        return max(0.0, (self.keep - _SPARSE_KEEP) / (1 - _SPARSE_KEEP))

    @property
    def keep_of_unit(self) -> float:
        """What the branches that leave blocks out keep on average in the passes that do."""
        sparse = (self.keep - self.share_of_dense_passes) / (1 - self.share_of_dense_passes)
        return sparse if self.branches == "both" else 2 * sparse - 1


def load_calibration(
    path: Path | None,
    *,
    data: str | None = None,
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> CalibrationConfig:
    """The resolved configuration: flags and `--set key=value` win over the file.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, or a value that isn't allowed.
    """
    return load(CalibrationConfig, path, flags(data=data, model=model, output=output, device=device), overrides)
