"""The same predictor of all layers side by side, as they are while they train.

A layer's networks are small and its steps all launches, so that of all layers are taken together: L layers' predictors
of S networks each are three tensors, and an input goes through three batched products. Nothing passes between layers.
A neuron that is taken out stays as zeros, in its weights and in the optimizer's state, until the end.

Shapes: L layers, S networks of a predictor, N rows of one document, n its blocks, r, m, o the widths of W1, W2, W3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lemo.selection.predictor import AttentionPredictor, Predictor
from lemo.selection.predictor_blocks import PLACES, Blocks, pairs_within_reach

# Share of the numbers that a training step leaves out.
_DROPPED = 0.1


@dataclass(frozen=True)
class Active:
    """What the networks' neurons put out for one document.

    Attributes:
        low: by token, [L, N, S, r].
        middle, top: [L, S, n, m] and [L, S, n, o] with pooling, else of N tokens.
    """

    low: Tensor
    middle: Tensor
    top: Tensor


class PredictorStack(nn.Module):
    """Predictors of one branch, one a layer, of the same widths.

    Args:
        predictors: whose matrices it begins with, and which `finish` writes.

    Attributes:
        first, second, third: the matrices, [L, S, r, D], [L, S, m, ·] and [L, S, o, m].
        awake: bool [L, S, r], [L, S, m] and [L, S, o]: neurons that are still there.
        center, spread, scale: [L, D], [L, D] and [L], as `Predictor` says.
        reach: of each of a pair's outputs, as `AttentionPredictor` says.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        super().__init__()
        self.predictors = tuple(predictors)
        self.pooled = predictors[0].pooled
        self.pairs = isinstance(predictors[0], AttentionPredictor)

        def stacked(index: int) -> nn.Parameter:
            of_layers = [[n.matrices[index] for n in p.by_name.values()] for p in predictors]
            return nn.Parameter(torch.stack([torch.stack(of_layer) for of_layer in of_layers]).detach())

        self.reach = predictors[0].reach.tolist() if isinstance(predictors[0], AttentionPredictor) else []
        self.first, self.second, self.third = (stacked(index) for index in range(3))
        self.awake = tuple(torch.ones_like(matrix[..., 0], dtype=torch.bool) for matrix in self.matrices)
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

    def forward(self, x_LND: Tensor, blocks: Blocks, dropping: torch.Generator | None = None) -> Active:
        """What the neurons put out for a document's normalised inputs.

        Args:
            x_LND: of each layer.
            blocks: where its blocks lie.
            dropping: leaves some of what W2 and W3 read out, the same for all layers: for training with pooling. What
                is put out of `middle` is whole.
        """
        L, S, r, D = self.first.shape
        dtype = x_LND.dtype
        # Of inputs made comparable, from inputs as they come.
        scaled = (self.first / self.spread[:, None, None]).view(L, S * r, D)
        bias = -(scaled @ self.center[:, :, None]).mT
        low = torch.relu(torch.baddbmm(bias.to(dtype), x_LND, scaled.mT.to(dtype)))
        if self.pooled:
            mean, largest = (x.unflatten(-1, (S, r)) for x in blocks.pool(low))
            places = blocks.places(mean.device, mean.dtype)[None, :, None].expand(L, -1, S, PLACES)
            pooled = _drop(torch.cat([mean, largest], -1), dropping)
            seen = torch.cat([pooled, places], -1).transpose(1, 2)
        else:
            seen = low.unflatten(-1, (S, r)).transpose(1, 2)
        middle = torch.relu(seen @ self.second.mT.to(seen.dtype))
        top = torch.relu(_drop(middle, dropping) @ self.third.mT.to(seen.dtype))
        return Active(low.unflatten(-1, (S, r)), middle, top)

    def estimates(self, active: Active) -> Tensor:
        """What is trained, in units of `scale`, fp32 or wider: pair scores [L, n, n], or tokens' activities [L, N]."""
        top = active.top.to(torch.promote_types(active.top.dtype, torch.float32))
        return pairs_within_reach(top[:, 0], top[:, 1], self.reach) if self.pairs else top[:, 0, :, 0]

    def inputs_awake(self) -> tuple[Tensor, Tensor]:
        """Which numbers W2 and W3 still read, bool [L, S, ·] each."""
        low, middle, _ = self.awake
        if not self.pooled:
            return low, middle
        # A neuron of the first layer gives the second its mean and its maximum; the block's place follows these.
        return torch.cat([low, low, low.new_ones(*low.shape[:2], PLACES)], -1), middle

    @torch.no_grad()
    def finish(self) -> list[Predictor]:
        """The predictors, as wide as they have become."""
        columns = (None, *self.inputs_awake())
        for layer, predictor in enumerate(self.predictors):
            predictor.forget()
            for name in ("center", "spread", "scale"):
                getattr(predictor, name).copy_(getattr(self, name)[layer])
            if isinstance(predictor, AttentionPredictor):
                reach = torch.tensor(self.reach, dtype=torch.int32, device=self.center.device)
                predictor.reach = reach[self.awake[2][layer, 0]]
            for s, network in enumerate(predictor.by_name.values()):
                for index, (matrix, rows, read) in enumerate(zip(self.matrices, self.awake, columns, strict=True)):
                    cut = matrix[layer, s][rows[layer, s]]
                    network.matrices[index].data = cut if read is None else cut[:, read[layer, s]]
        return list(self.predictors)


def _drop(numbers: Tensor, dropping: torch.Generator | None) -> Tensor:
    """Some numbers set to zero and the others made up for it, each in all layers, the first dimension."""
    if dropping is None:
        return numbers
    drawn = torch.rand(numbers.shape[1:], generator=dropping, device=numbers.device)
    return numbers * ((drawn >= _DROPPED) / (1 - _DROPPED)).to(numbers.dtype)


def mean_score(exact: Tensor) -> Tensor:
    """Mean of each layer's scores that count, [L]: of pairs [L, n, n], those on and under the diagonal."""
    if exact.dim() == 2:
        return exact.mean(-1)
    n = exact.shape[-1]
    return exact.sum((-2, -1)) / (n * (n + 1) / 2)
