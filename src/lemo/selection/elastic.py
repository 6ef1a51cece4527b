"""Elastic size transformation (paper section 4.3): neurons that a ReLU keeps at zero are taken out during training.

A neuron's zero frequency is the share of inputs since the last pruning for which its ReLU put out 0. The optimizer's
state is cut in the same places as the matrices, so that training goes on as if the neurons had never been there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemo.selection.predictor import AttentionPredictor, LowRankNetwork

# A layer never shrinks under this.
LEAST_WIDTH = 4


class ZeroCounts:
    """How often each neuron of a network was at zero.

    Args:
        network: what is watched.
    """

    def __init__(self, network: LowRankNetwork) -> None:
        self.network = network
        self.reset()

    def reset(self) -> None:
        """Starts anew, for the network's present widths."""
        self.inputs = 0
        self._zeros = [m.new_zeros(m.shape[0]) for m in self.network.matrices]

    @torch.no_grad()
    def add(self, activations: list[Tensor]) -> None:
        """Some inputs' activations after each ReLU, [n, width] each."""
        self.inputs += activations[0].shape[0]
        for zeros, active in zip(self._zeros, activations, strict=True):
            zeros += (active == 0).sum(0)

    def frequencies(self) -> list[Tensor]:
        """Zero frequency of each layer's neurons, [width] each; 0 before any input."""
        return [zeros / max(1, self.inputs) for zeros in self._zeros]


def idle(frequency: Tensor, above: float) -> Tensor:
    """Which neurons stay, bool [width]: those at zero in at most that share of inputs, and always the busiest few."""
    stay = frequency <= above
    stay[frequency.argsort()[:LEAST_WIDTH]] = True
    return stay


def prune_network(network: LowRankNetwork, stay: list[Tensor | None], optimizer: torch.optim.Optimizer) -> None:
    """Takes neurons out.

    Args:
        network: changed in place; its parameters stay the same objects.
        stay: for each layer, bool [width], or None for all.
        optimizer: whose state of these parameters is cut with them.
    """
    matrices = list(network.matrices)
    for index, kept in enumerate(stay):
        if kept is None or bool(kept.all()):
            continue
        _cut(matrices[index], kept, 0, optimizer)
        if index + 1 < len(matrices):
            _cut(matrices[index + 1], kept, 1, optimizer)


def prune_predictor(
    predictor: AttentionPredictor, query: ZeroCounts, key: ZeroCounts, above: float, optimizer: torch.optim.Optimizer
) -> None:
    """Takes the idle neurons out of both networks; an output that either leaves at zero out of both."""
    q, k = query.frequencies(), key.frequencies()
    last = idle(torch.maximum(q[-1], k[-1]), above)
    for network, frequencies in ((predictor.query, q), (predictor.key, k)):
        prune_network(network, [*(idle(f, above) for f in frequencies[:-1]), last], optimizer)
    query.reset()
    key.reset()


def _cut(matrix: nn.Parameter, kept: Tensor, dim: int, optimizer: torch.optim.Optimizer) -> None:
    where = kept.nonzero().flatten()
    whole = matrix.shape
    matrix.data = matrix.data.index_select(dim, where)
    matrix.grad = None
    for name, value in optimizer.state.get(matrix, {}).items():
        if isinstance(value, Tensor) and value.shape == whole:
            optimizer.state[matrix][name] = value.index_select(dim, where)
