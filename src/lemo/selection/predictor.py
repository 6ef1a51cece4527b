"""Predictors of informativeness (paper section 4.3): what a block's tokens are worth, from one vector a block.

Attention: a pair of small networks of three low-rank matrices with ReLU maps each block's representative to I(Q) and
I(K), whose products estimate the block-pair scores. Summed over query blocks as the exact scores are, a block's
informativeness costs one product of sums: the pairs are never formed. MLP: a network of the same form maps the
representative to the block's activity.

A representative is the mean of the block's normalised inputs, and where the block lies in its document. Networks are
trained in `lemo.selection.training`, where they shrink.

Shapes: n blocks of one document, D hidden size, m width of I(Q) and I(K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lemo.types import SequenceLayout

# Distances in blocks over which scores change: a block's place is told at each.
_PERIODS = (8, 32, 128, 512)
PLACES = 3 + 2 * len(_PERIODS)


class LowRankNetwork(nn.Module):
    """x -> relu(W3 relu(W2 relu(W1 x))); its widths may shrink while it trains.

    Args:
        inputs: length of x.
        widths: rows of W1, W2, W3.
    """

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = (inputs, *widths)
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(out, into) * math.sqrt(2 / into)) for into, out in pairwise(sizes)
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each matrix."""
        return tuple(matrix.shape[0] for matrix in self.matrices)

    def activations(self, x_nD: Tensor) -> list[Tensor]:
        """Outputs after each ReLU, [n, width] each; the last is the network's."""
        found = []
        for matrix in self.matrices:
            x_nD = torch.relu(x_nD @ matrix.T)
            found.append(x_nD)
        return found

    def forward(self, x_nD: Tensor) -> Tensor:
        """[n, last width]."""
        return self.activations(x_nD)[-1]


class AttentionPredictor(nn.Module):
    """I(Q) and I(K) of blocks.

    Args:
        inputs: length of a representative with its place.
        widths: of both networks.
        scale: mean of the exact pair scores that it was trained on.
    """

    def __init__(self, inputs: int, widths: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.query = LowRankNetwork(inputs, widths)
        self.key = LowRankNetwork(inputs, widths)
        self.register_buffer("scale", torch.tensor(scale))

    def pair_scores(self, x_nD: Tensor) -> Tensor:
        """Estimated pair scores of one document, [n, n]; query block, key block, 0 above the diagonal."""
        return (self.query(x_nD) @ self.key(x_nD).T).tril() * self.scale

    def informativeness(self, x_nD: Tensor, causal: bool) -> Tensor:
        """`lemo.selection.scores.attention_informativeness` of the estimated pair scores, [n], in O(n·m)."""
        query, key = self.query(x_nD), self.key(x_nD)
        n = x_nD.shape[0]
        if not causal:
            later = query.flip(0).cumsum(0).flip(0)
            return (later * key).sum(-1) * self.scale / n
        seen = (query * key.cumsum(0)).sum(-1) * self.scale
        view = seen / torch.arange(1, n + 1, device=seen.device)
        return torch.cat([view.new_zeros(1), view[:-1]])


class ActivityPredictor(nn.Module):
    """The MLP's mean activity in blocks.

    Args:
        inputs: length of a representative with its place.
        widths: of the hidden layers.
        scale: mean activity that it was trained on.
    """

    def __init__(self, inputs: int, widths: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.network = LowRankNetwork(inputs, (*widths, 1))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x_nD: Tensor) -> Tensor:
        """[n]."""
        return self.network(x_nD)[:, 0] * self.scale


def representatives(normed_ND: Tensor, layout: SequenceLayout) -> list[Tensor]:
    """Each document's representatives: mean of each block's rows, then its place; fp32 [n, D + PLACES].

    Args:
        normed_ND: the branch's normalised input, [B·T, D].
        layout: documents and blocks.
    """
    size, found = layout.block_size, []
    for (first, end), blocks in zip(layout.documents, layout.blocks_per_document, strict=True):
        whole = (end - first) // size
        rows = normed_ND[first : first + whole * size]
        means = rows.view(whole, size, -1).mean(1, dtype=torch.float32)
        if whole < blocks:
            rest = normed_ND[first + whole * size : end].mean(0, keepdim=True, dtype=torch.float32)
            means = torch.cat([means, rest])
        found.append(torch.cat([means, places(blocks, means.device)], 1))
    return found


def places(blocks: int, device: torch.device) -> Tensor:
    """Where each block of a document lies, fp32 [blocks, PLACES]; nothing of it depends on later blocks."""
    index = torch.arange(blocks, device=device, dtype=torch.float32)
    angles = [2 * math.pi * index / period for period in _PERIODS]
    columns = [torch.ones_like(index), torch.log1p(index) / 4, 1 / (1 + index)]
    columns += [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
    return torch.stack(columns, 1)
