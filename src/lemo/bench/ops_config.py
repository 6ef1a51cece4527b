"""What `lemo bench ops` measures: single operations, each by our kernel, its plain twin and what else does the same.

Imports no torch, so that mistakes are found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lemo.bench.config import Tokens
from lemo.config import Frozen, Share
from lemo.config_io import flags, load

LossCode = Literal["lemo", "liger", "cce", "logits"]
Dtype = Literal["bfloat16", "float16", "float32"]


class MovementOps(Frozen):
    """Rows of the residual stream, read and added to: the kernels, their twins, and the naive way.

    Args:
        width: D.
        lengths: T.
        keeps: shares of the blocks that are kept; the first and the last always are, the others are drawn.
        block_size: tokens a block.
    """

    width: int = Field(default=4096, ge=1)
    lengths: tuple[Tokens, ...] = Field(min_length=1)
    keeps: tuple[Share, ...] = Field(min_length=1)
    block_size: int = Field(default=64, ge=1)


class LossOps(Frozen):
    """Head and cross-entropy with the gradient of the hidden states; the head is frozen, every token labelled.

    Args:
        width, vocabulary: D and V.
        lengths: T.
        codes: `lemo`: the segmented loss. `liger`: Liger's fused linear cross-entropy. `cce`: cut cross-entropy
            (`cut_cross_entropy`). `logits`: all of them at once.
    """

    width: int = Field(default=4096, ge=1)
    vocabulary: int = Field(default=128256, ge=2)
    lengths: tuple[Tokens, ...] = Field(min_length=1)
    codes: tuple[LossCode, ...] = Field(default=("lemo", "liger", "cce", "logits"), min_length=1)


class OpsConfig(Frozen):
    """A benchmark of single operations: a YAML file plus `--set key=value`.

    Args:
        movement, loss: what is measured; None leaves it out.
        warm_up: calls before the timed ones.
        repeats: timed calls; median and range are recorded.
        dtype: of all tensors.
        commit: recorded in every row; None asks git.
        output: directory of `records.jsonl`, `report.html` and the resolved `config.yaml`.
    """

    movement: MovementOps | None = None
    loss: LossOps | None = None
    warm_up: int = Field(default=3, ge=0)
    repeats: int = Field(default=20, ge=1)
    dtype: Dtype = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    commit: str | None = None
    output: str = "runs/ops"

    @model_validator(mode="after")
    def _something(self) -> OpsConfig:
        if self.movement is None and self.loss is None:
            raise ValueError("give movement, loss or both: there is nothing to measure")
        return self


def load_ops(
    path: Path, *, output: str | None = None, device: str | None = None, overrides: Sequence[str] = ()
) -> OpsConfig:
    """The resolved configuration: flags and `--set key=value` win over the file.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, or a value that isn't allowed.
    """
    return load(OpsConfig, path, flags(output=output, device=device), overrides)
