"""The MLP predictors of all layers side by side, as they are while they train.

A predictor is small and its steps all launches, so that those of all layers are taken together: L layers' predictors
are three tensors, and an input goes through three batched products. Nothing passes between layers. A neuron that is
taken out stays as zeros, in its weights and in the optimizer's state, until the end.

Shapes: L layers, N rows of one document, r, m the rows of W1 and W2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lemo.selection.predictor import ActivityPredictor
from lemo.selection.score_errors import mean_score


@dataclass(frozen=True)
class Active:
    """What the neurons put out for one document, by token: [L, N, r], [L, N, m] and, of the last matrix, [L, N]."""

    low: Tensor
    middle: Tensor
    top: Tensor


class PredictorStack(nn.Module):
    """Predictors, one a layer, of the same widths.

    Args:
        predictors: whose matrices it begins with, and which `finish` writes.

    Attributes:
        first, second, third: the matrices, [L, r, D], [L, m, r] and [L, 1, m].
        awake: bool [L, r] and [L, m]: neurons that are still there.
        center, spread, scale: [L, D], [L, D] and [L], as `ActivityPredictor` says.
    """

    def __init__(self, predictors: Sequence[ActivityPredictor]) -> None:
        super().__init__()
        self.predictors = tuple(predictors)
        self.first, self.second, self.third = (
            nn.Parameter(torch.stack([p.matrices[index] for p in predictors]).detach()) for index in range(3)
        )
        self.awake = tuple(torch.ones_like(matrix[..., 0], dtype=torch.bool) for matrix in self.matrices[:2])
        self.center, self.spread, self.scale = (
            torch.stack([getattr(p, name) for p in predictors]) for name in ("center", "spread", "scale")
        )

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """W1, W2, W3."""
        return self.first, self.second, self.third

    @torch.no_grad()
    def measure(self, x_LND: Tensor, exact: Tensor) -> None:
        """Takes center, spread and scale from a document."""
        for layer, x in enumerate(x_LND):
            x = x.to(self.center.dtype)
            self.center[layer], self.spread[layer] = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        self.scale.copy_(mean_score(exact).clamp(min=torch.finfo(torch.float32).tiny))

    def forward(self, x_LND: Tensor) -> Active:
        """What the neurons put out for a document's normalised inputs, of each layer."""
        dtype = x_LND.dtype
        # Of inputs made comparable, from inputs as they come.
        scaled = self.first / self.spread[:, None]
        bias = -(scaled @ self.center[:, :, None]).mT
        low = torch.relu(torch.baddbmm(bias.to(dtype), x_LND, scaled.mT.to(dtype)))
        middle = torch.relu(low @ self.second.mT.to(dtype))
        return Active(low, middle, torch.relu(middle @ self.third.mT.to(dtype))[..., 0])

    def reads(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Which numbers each matrix still reads, bool [L, ·]; None for all."""
        low, middle = self.awake
        return None, low, middle

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which rows of each matrix are still there, bool [L, ·]; None for all."""
        low, middle = self.awake
        return low, middle, None

    @torch.no_grad()
    def finish(self) -> list[ActivityPredictor]:
        """The predictors, as wide as they have become."""
        for layer, predictor in enumerate(self.predictors):
            predictor.forget()
            for name in ("center", "spread", "scale"):
                getattr(predictor, name).copy_(getattr(self, name)[layer])
            for index, (matrix, rows, read) in enumerate(zip(self.matrices, self.rows(), self.reads(), strict=True)):
                cut = matrix[layer] if rows is None else matrix[layer][rows[layer]]
                predictor.matrices[index].data = cut if read is None else cut[:, read[layer]]
        return list(self.predictors)
