"""Elastic size transformation (paper section 4.3): neurons that a ReLU keeps at zero are taken out during training.

A neuron's zero frequency is the share of tokens since the last pruning for which its ReLU put out 0.
The idlest of each layer go, a few at a time. A frequency over which they would go says nothing of the size.
What is taken out becomes zero in the matrices and in the optimizer's state, and stays so: nothing passes through it,
forward or backward, and training goes on as if it had never been there. The others' state is untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.selection.predictor_stack import Active, PredictorStack

# A layer never shrinks under this.
LEAST_WIDTH = 4


class ZeroCounts:
    """How often each neuron was at zero.

    Args:
        stack: what is watched.
    """

    def __init__(self, stack: PredictorStack) -> None:
        self.stack = stack
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self.documents = 0
        self._zeros = [torch.zeros_like(awake, dtype=torch.float32) for awake in self.stack.awake]

    @torch.no_grad()
    def add(self, active: Active) -> None:
        """What the neurons put out for one document."""
        self.documents += 1
        for zeros, numbers in zip(self._zeros, (active.low, active.middle), strict=True):
            zeros += (numbers == 0).float().mean(1)

    def frequencies(self) -> list[Tensor]:
        """Zero frequency of each layer's neurons, shaped as `PredictorStack.awake`; 0 before any input."""
        return [zeros / max(1, self.documents) for zeros in self._zeros]


@torch.no_grad()
def prune(stack: PredictorStack, counts: ZeroCounts, share: float, optimizer: torch.optim.Optimizer) -> None:
    """Takes idle neurons out, and starts the counts anew.

    Args:
        stack: changed in place.
        counts: of it.
        share: of the first two layers' neurons, as many as there were at first, that stay: the busiest.
        optimizer: whose state of the neurons is zeroed too.
    """
    for awake, frequency in zip(stack.awake, counts.frequencies(), strict=True):
        few = max(LEAST_WIDTH, round(share * awake.shape[-1]))
        awake &= _busiest(frequency.masked_fill(~awake, 2.0), few)
    for matrix, rows, read in zip(stack.matrices, stack.rows(), stack.reads(), strict=True):
        there = torch.ones_like(matrix, dtype=torch.bool)
        there = there if rows is None else there & rows[..., None]
        there = there if read is None else there & read[..., None, :]
        matrix.mul_(there)
        for value in optimizer.state.get(matrix, {}).values():
            if isinstance(value, Tensor) and value.shape == matrix.shape:
                value *= there
    counts.reset()


def _busiest(frequency: Tensor, few: int) -> Tensor:
    """So many neurons of lowest zero frequency in each layer; bool, as `frequency`."""
    chosen = frequency.argsort(dim=-1, stable=True)[..., :few]
    return torch.zeros_like(frequency, dtype=torch.bool).scatter(-1, chosen, True)
