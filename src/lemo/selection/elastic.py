"""Elastic size transformation (paper section 4.3): neurons that a ReLU keeps at zero are taken out during training.

A neuron's zero frequency is the share of inputs (tokens or blocks) since the last pruning for which its ReLU put out 0.
The optimizer's state is cut in the same places as the matrices, so that training goes on as if the neurons had never
been there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemo.selection.predictor import LowRankNetwork, Predictor

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
        self.documents = 0
        self._zeros = [m.new_zeros(m.shape[0]) for m in self.network.matrices]

    @torch.no_grad()
    def add(self, activations: list[Tensor]) -> None:
        """What each layer put out for one document's blocks or tokens, [·, width] each."""
        self.documents += 1
        for zeros, active in zip(self._zeros, activations, strict=True):
            zeros += (active == 0).float().mean(0)

    def frequencies(self) -> list[Tensor]:
        """Zero frequency of each layer's neurons, [width] each; 0 before any input."""
        return [zeros / max(1, self.documents) for zeros in self._zeros]


def prune(predictor: Predictor, counts: dict[str, ZeroCounts], above: float, optimizer: torch.optim.Optimizer) -> None:
    """Takes the idle neurons out of a predictor's networks, and starts the counts anew.

    The networks of one predictor have the same outputs, which are multiplied: one that any leaves at zero goes from
    all. A network's only output stays.

    No graph of an earlier loss may be alive: autograd would expect gradients of the old shapes.

    Args:
        predictor: changed in place; its parameters stay the same objects.
        counts: of each of its networks, by name.
        above: zero frequency over which a neuron is idle.
        optimizer: whose state is cut with the matrices.
    """
    frequencies = {name: count.frequencies() for name, count in counts.items()}
    outputs = torch.stack([layers[-1] for layers in frequencies.values()]).amax(0)
    for name, count in counts.items():
        first, second, third = count.network.matrices
        low, middle = (_busy(frequency, above) for frequency in frequencies[name][:-1])
        pooled = low
        if count.network.pooled:
            # A neuron of the first layer gives the second its mean and its maximum; the block's place follows these.
            r = first.shape[0]
            pooled = torch.cat([low, r + low, torch.arange(2 * r, second.shape[1], device=low.device)])
        _cut(first, low, 0, optimizer)
        _cut(second, pooled, 1, optimizer)
        _cut(second, middle, 0, optimizer)
        _cut(third, middle, 1, optimizer)
        _cut(third, _busy(outputs, above), 0, optimizer)
        count.reset()


def _busy(frequency: Tensor, above: float) -> Tensor:
    """Neurons at zero for at most that share of inputs, and always the busiest few; int64, ascending."""
    stay = frequency <= above
    stay[frequency.argsort()[:LEAST_WIDTH]] = True
    return stay.nonzero().flatten()


def _cut(matrix: nn.Parameter, stay: Tensor, dim: int, optimizer: torch.optim.Optimizer) -> None:
    if len(stay) == matrix.shape[dim]:
        return
    whole = matrix.shape
    matrix.data = matrix.data.index_select(dim, stay)
    matrix.grad = None
    for name, value in optimizer.state.get(matrix, {}).items():
        if isinstance(value, Tensor) and value.shape == whole:
            optimizer.state[matrix][name] = value.index_select(dim, stay)
