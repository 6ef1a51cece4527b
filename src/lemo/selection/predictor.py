"""Predictors of informativeness (paper section 4.3): what a block's tokens are worth, from three low-rank matrices.

Attention: a first matrix takes each token of the normalised input to a few numbers; their mean and maximum over the
block, and where the block lies in its document, are the block's representative, and two more matrices with ReLU make
of it I(Q) and I(K), whose products estimate the block-pair scores. Queries score the blocks just before them highest,
which no product of two blocks' numbers tells, so parts of I(Q) and I(K) meet over a few blocks only. Summed over query
blocks as the exact scores are, a block's informativeness costs one product of sums: the pairs are never formed.

MLP: three matrices with ReLU estimate each token's activity, whose mean over the block is the block's.

The paper's representatives are means of inputs, taken before any matrix. A score is a maximum over tokens, which a mean
of inputs hardly tells (docs/decisions/0009); to read the inputs costs the same either way.

They are trained by `lemo.selection.predictor_training`, where they shrink (`lemo.selection.elastic`).

Shapes: N rows, D hidden size, n blocks of one document, m width of I(Q) and I(K).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.kernels.dispatch import prediction_backend, ranking_backend
from lemo.selection.layout import table_of_documents
from lemo.selection.predictor_blocks import (
    PLACES,
    Blocks,
    pairs_within_reach,
    places_of_batch,
    reaches,
    side_by_side,
    within_reach,
)
from lemo.selection.scores import causal_view, from_predecessor
from lemo.types import NormWeights, SequenceLayout

if TYPE_CHECKING:
    from lemo.kernels.prediction import FirstLook

LAYERS = 3
# Documents of a batch side by side are at most so many times its blocks; else they come one by one.
_PADDED = 4


class LowRankNetwork(nn.Module):
    """Three low-rank matrices with ReLU, as wide as training left them.

    Args:
        width: D.
        widths: rows of W1, W2, W3.
        pooled: whether W2 sees W1's outputs pooled by block, and its place, or each token's.
    """

    def __init__(self, width: int, widths: Sequence[int], pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        inputs = (width, 2 * widths[0] + PLACES if pooled else widths[0], widths[1])
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(out, into) / math.sqrt(into / 2), requires_grad=False)
            for into, out in zip(inputs, widths, strict=True)
        )
        # Outputs begin over zero: an output that is zero for every input would never learn.
        self.matrices[-1].data.abs_()

    @property
    def widths(self) -> tuple[int, int, int]:
        """Rows of each matrix."""
        first, second, third = self.matrices
        return first.shape[0], second.shape[0], third.shape[0]


@dataclass(frozen=True)
class _Stacked:
    """All networks of a predictor as one, in one dtype: an input goes through three products, however many there are.

    Attributes:
        first, bias: the first matrices, for inputs as they come, [r, D] and [r].
        second: of all pooled means, all maxima and the place, or of the tokens' r numbers, [·, m].
        third: [m, outputs]; the last network's outputs are in the scores' unit.
    """

    first: Tensor
    bias: Tensor
    second: Tensor
    third: Tensor


class Predictor(nn.Module):
    """What both kinds share: inputs made comparable, outputs in the scores' unit.

    Attributes:
        center, spread: mean and standard deviation of each input on the sample, [D].
        scale: mean of the exact scores on the sample.
        pooled: whether the networks' second layers see blocks, or tokens.
    """

    pooled: bool
    center: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, names: Sequence[str], width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: LowRankNetwork(width, widths, self.pooled) for name in names})
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("scale", torch.tensor(1.0))
        self._stacked: _Stacked | None = None
        self._first_look: tuple[tuple[Any, ...], list[Tensor], FirstLook] | None = None
        self._numbers: int | None = None

    def forget(self) -> None:
        """Drops what was made from the matrices, which have changed."""
        self._stacked = self._first_look = self._numbers = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def outputs(self, x_ND: Tensor, blocks: Blocks) -> Tensor:
        """The networks' outputs side by side, the last one's in the scores' unit, [n, outputs]; for one document.

        Args:
            x_ND: the branch's normalised inputs.
            blocks: where its blocks lie.
        """
        stacked = self._stack(x_ND.dtype)
        low = torch.relu(F.linear(x_ND, stacked.first, stacked.bias))
        if not self.pooled:
            return blocks.mean(torch.relu(torch.relu(low @ stacked.second) @ stacked.third))
        mean, largest = blocks.pool(low)
        return self._later(torch.cat([mean, largest, blocks.places(x_ND.device, mean.dtype)], 1), stacked)

    def outputs_by_kernel(self, hidden_ND: Tensor, norm: NormWeights, layout: SequenceLayout) -> Tensor:
        """The same of all the batch's blocks, [blocks, outputs], from the residual stream; fp32.

        Args:
            hidden_ND: what goes into the branch's norm, [B·T, D].
            norm: that norm.
            layout: documents and blocks.
        """
        from lemo.kernels.prediction import later_look, mean_activity, pooled_look

        stacked, look = self._stack(hidden_ND.dtype), self._look(hidden_ND.dtype, norm)
        where = (layout.first_row_of_block, layout.block_tokens, layout.block_size)
        if not self.pooled:
            return mean_activity(hidden_ND, look, stacked.second, stacked.third[:, 0], *where)[:, None]
        pooled = pooled_look(hidden_ND, look, *where)
        places = places_of_batch(layout.blocks_per_document, hidden_ND.device)
        return later_look(pooled, places, stacked.second, stacked.third)

    def _first_matrices(self) -> Tensor:
        """The networks' first matrices in one, for inputs that are only centred, [r, D]."""
        return torch.cat([network.matrices[0] for network in self.by_name.values()]) / self.spread

    @staticmethod
    def _later(seen: Tensor, stacked: _Stacked) -> Tensor:
        # Products the other way round, so that `scores` finds its rows in memory.
        return torch.relu(stacked.third.T @ torch.relu(stacked.second.T @ seen.T)).T

    def _look(self, dtype: torch.dtype, norm: NormWeights) -> FirstLook:
        """The first matrices for inputs before their norm. Made anew where the norm's weights have changed, and each
        time where they can train: fused optimizers leave a tensor's version alone."""
        weights = [x for x in (norm.weight, norm.bias) if x is not None]
        if any(x.requires_grad or x.is_inference() for x in weights):
            self._first_look = None
            return self._look_anew(dtype, norm)
        held, made_from = self._first_look, (dtype, norm.eps, *(x._version for x in weights))
        if held is None or held[0] != made_from or not all(map(operator.is_, held[1], weights)):
            held = self._first_look = (made_from, weights, self._look_anew(dtype, norm))
        return held[2]

    @torch.no_grad()
    def _look_anew(self, dtype: torch.dtype, norm: NormWeights) -> FirstLook:
        from lemo.kernels.prediction import FirstLook

        first = self._first_matrices()
        shift = -self.center if norm.bias is None else norm.bias.float() - self.center
        matrix = (first * norm.weight.float()).to(dtype).contiguous()
        return FirstLook(matrix, first @ shift, matrix.float().sum(1) if norm.centered else None, norm.eps)

    def _stack(self, dtype: torch.dtype) -> _Stacked:
        """Made once for a dtype and device."""
        held = self._stacked
        if held is None or held.first.dtype != dtype or held.first.device != self.center.device:
            held = self._stacked = self._stack_anew(dtype)
        return held

    @torch.no_grad()
    def _stack_anew(self, dtype: torch.dtype) -> _Stacked:
        networks = list(self.by_name.values())
        seconds = [network.matrices[1] for network in networks]
        widths = [network.widths[0] for network in networks]
        if self.pooled:
            parts = [second.split([r, r, PLACES], 1) for second, r in zip(seconds, widths, strict=True)]
            means, maxima, places = zip(*parts, strict=True)
            second = torch.cat([torch.block_diag(*means), torch.block_diag(*maxima), torch.cat(places)], 1)
        else:
            second = torch.block_diag(*seconds)
        thirds = [network.matrices[2] for network in networks]
        third = torch.block_diag(*thirds[:-1], thirds[-1] * self.scale)
        first = self._first_matrices()
        bias = -(first @ self.center)
        later = torch.promote_types(dtype, torch.float32) if self.pooled else dtype
        second, third = (matrix.T.to(later).contiguous() for matrix in (second, third))
        return _Stacked(first.to(dtype), bias.to(dtype), second, third)

    @property
    def numbers(self) -> int:
        """What the first matrices make of a token."""
        if self._numbers is None:
            self._numbers = sum(network.widths[0] for network in self.by_name.values())
        return self._numbers

    @property
    def by_name(self) -> dict[str, LowRankNetwork]:
        """Its networks."""
        return {name: cast(LowRankNetwork, network) for name, network in self.networks.items()}

    @property
    def device(self) -> torch.device:
        """Where its matrices lie."""
        return self.center.device

    @property
    def size(self) -> int:
        """Numbers in the matrices."""
        return sum(p.numel() for p in self.parameters())

    def informativeness(self, x_ND: Tensor, blocks: Blocks, causal: bool) -> Tensor:
        """One document's block scores, fp32 [n], as `lemo.selection.scores` computes them from exact ones."""
        return self.scores(self.outputs(x_ND, blocks), (blocks.count,), causal)

    def scores(self, outputs: Tensor, counts: tuple[int, ...], causal: bool) -> Tensor:
        """A batch's block scores, [blocks], from the networks' outputs.

        Args:
            outputs: [blocks, outputs].
            counts: blocks of each document.
            causal: the score that looks at earlier blocks only.
        """
        # torch adds up along rows ten times as fast as along columns.
        by_row = outputs.T.contiguous()
        if len(counts) * max(counts) > _PADDED * len(outputs):
            parts = by_row.split(counts, 1)
            return torch.cat([self.scores(x.T, (n,), causal) for x, n in zip(parts, counts, strict=True)])
        side = side_by_side(counts, outputs.device)
        if len(counts) == 1:
            return self._scores(by_row[:, None], side.counts, causal)[0]
        # A block of zeros where there is none.
        score = self._scores(F.pad(by_row, (0, 1))[:, side.blocks], side.counts, causal)
        return score.flatten()[side.there]

    def scores_by_kernel(self, outputs: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
        """The same where kernels run."""
        return self.scores(outputs, layout.blocks_per_document, causal)

    def _scores(self, outputs: Tensor, counts: Tensor, causal: bool) -> Tensor:
        """The same of documents side by side: [documents, n] from [outputs, documents, n]."""
        raise NotImplementedError


class AttentionPredictor(Predictor):
    """I(Q) and I(K) of blocks.

    Args:
        width: D.
        widths: of both networks.

    Attributes:
        reach: over how many blocks each of their outputs meets, [m].
    """

    pooled = True
    reach: Tensor

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__(("query", "key"), width, widths)
        self.register_buffer("reach", reaches(widths[-1]))

    def pair_scores(self, x_ND: Tensor, blocks: Blocks) -> Tensor:
        """Estimated pair scores of one document, [n, n]; query block, key block, 0 above the diagonal."""
        query, key = self.outputs(x_ND, blocks).chunk(2, 1)
        return pairs_within_reach(query, key, self.reach.tolist())

    def scores_by_kernel(self, outputs: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
        longest = max(layout.blocks_per_document)
        if causal or ranking_backend(outputs, longest) == "torch":
            return super().scores_by_kernel(outputs, layout, causal)
        from lemo.kernels.ranking import later_products

        return later_products(outputs, self.reach, table_of_documents(layout), longest)

    def _scores(self, outputs: Tensor, counts: Tensor, causal: bool) -> Tensor:
        query, key = outputs.chunk(2, 0)
        if not causal:
            return torch.linalg.vecdot(within_reach(query, self.reach, later=True), key, dim=0) / counts
        return causal_view(torch.linalg.vecdot(query, within_reach(key, self.reach, later=False), dim=0))


class ActivityPredictor(Predictor):
    """The MLP's mean activity in blocks.

    Args:
        width: D.
        widths: of the network; the last becomes 1.
    """

    pooled = False

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__(("activity",), width, (*widths[:-1], 1))

    def scores_by_kernel(self, outputs: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
        return super().scores_by_kernel(outputs, layout, causal) if causal else outputs[:, 0]

    def _scores(self, outputs: Tensor, counts: Tensor, causal: bool) -> Tensor:
        return from_predecessor(outputs[0]) if causal else outputs[0]


KINDS: dict[str, type[AttentionPredictor] | type[ActivityPredictor]] = {
    "attention": AttentionPredictor,
    "mlp": ActivityPredictor,
}


def predicted_scores(
    predictor: Predictor,
    hidden_ND: Tensor,
    norm: Callable[[Tensor], Tensor],
    weights: NormWeights | None,
    layout: SequenceLayout,
    causal: bool,
) -> Tensor:
    """Estimated block scores of a batch, fp32 [blocks].

    Args:
        predictor: of the branch.
        hidden_ND: what goes into the branch's norm, [B·T, D].
        norm: that norm.
        weights: the norm's, None if they aren't known; then it runs, and no kernel.
        layout: documents and blocks.
        causal: the score that looks at earlier blocks only.
    """
    backend = prediction_backend(hidden_ND, layout.block_size, predictor.numbers, weights is not None)
    # Thresholds were chosen for scores computed so.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if backend == "triton" and weights is not None:
            return predictor.scores_by_kernel(predictor.outputs_by_kernel(hidden_ND, weights, layout), layout, causal)
        normed, size = norm(hidden_ND), layout.block_size
        documents = layout.documents
        outputs = torch.cat([predictor.outputs(normed[a:b], Blocks(b - a, size)) for a, b in documents])
        return predictor.scores(outputs, layout.blocks_per_document, causal)
