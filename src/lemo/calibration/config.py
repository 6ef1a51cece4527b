"""Configuration of a calibration. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lemo.config import DataConfig, Frozen, ModelConfig, PredictorConfig, Share
from lemo.config_io import flags, load


class CalibrationConfig(Frozen):
    """One run of `lemo calibrate`: a YAML file plus `--set key=value`.

    Args:
        model: what is calibrated, in the dtype it will be trained in.
        data: a sample like the training data. Predictors and bypasses are fitted to its training part and judged, and
            thresholds chosen, on its held-out part.
        block_size: tokens per block.
        score: as in `SparsityConfig.score`.
        branches: which branches may leave blocks out.
        keep: average share of the blocks kept, over both branches of all layers.
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
    score: Literal["paper", "mass", "causal"] = "paper"
    branches: Literal["both", "attention", "mlp"] = "both"
    keep: Share = 0.75
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
        return self


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
