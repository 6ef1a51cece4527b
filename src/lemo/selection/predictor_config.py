"""Configuration of predictors. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lemo.config import Frozen


class PredictorConfig(Frozen):
    """How predictors are made: attention's by `lemo.selection.score_heads_training`, MLPs' by
    `lemo.selection.predictor_training`.

    Args:
        rank: width of all virtual heads of a layer's attention together, of queries as of keys, before they shrink;
            heads are as wide as the model's, at least one, at most as many as its own.
        head_steps: their training steps; 0 leaves them the true heads that they begin as.
        head_rate: Adam's rate as a share of the weights' size; it falls to zero along a cosine.
        widths: rows of the first two matrices of an MLP's predictor before they shrink.
        steps: its training steps; all layers' predictors make each together.
        memory_gib: newest documents that a step's is drawn from, as many as take so many GiB on the model's device; of
            each branch.
        learning_rate, weight_decay: AdamW's for an MLP's; the rate falls to zero along a cosine.
        size: share of predictors' numbers that shrinking leaves: of an MLP's first two matrices' rows, and of all
            layers' virtual heads, which then share keys as the model's do, more in some layers than in others. 1 keeps
            all.
        prune_every: steps between prunings.
    """

    rank: int = Field(default=320, ge=1)
    head_steps: int = Field(default=200, ge=0)
    head_rate: float = Field(default=0.003, gt=0)
    widths: tuple[Annotated[int, Field(ge=4)], Annotated[int, Field(ge=4)]] = (64, 64)
    steps: int = Field(default=4096, ge=1)
    memory_gib: float = Field(default=8.0, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1.0, ge=0)
    size: float = Field(default=0.65, gt=0, le=1)
    prune_every: int = Field(default=64, ge=1)

    def heads(self, head_size: int, of: int) -> int:
        """Virtual heads of a layer before they shrink, where heads are so large and the layer has so many."""
        return min(of, max(1, self.rank // head_size))

    def heads_left(self, head_size: int, of: int) -> tuple[float, float]:
        """Query heads and keys that a layer has on average after they have shrunk: as many numbers as `size` says, of
        which keys have a third (SmolLM2's calibrations leave 4.1 to 4.5 and 2.2)."""
        whole = self.heads(head_size, of)
        if self.size == 1:
            return whole, whole
        left = max(2.0, 2 * whole * self.size)
        keys = max(1.0, left / 3)
        return left - keys, keys
