"""Elastic size transformation (paper section 4.3): neurons that a ReLU keeps at zero are taken out during training.

A neuron's zero frequency is the share of inputs (tokens or blocks) since the last pruning for which its ReLU put out 0.
The idlest of each layer go, a few at a time. A frequency over which they would go says nothing of the size: at one that
leaves attention's predictors 57% of their numbers MLPs' keep 87%, and a middle layer's next to none.
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
        found = ((active.low == 0).float().mean(1), *((x == 0).float().mean(2) for x in (active.middle, active.top)))
        for zeros, share in zip(self._zeros, found, strict=True):
            zeros += share

    def frequencies(self) -> list[Tensor]:
        """Zero frequency of each layer's neurons, shaped as `PredictorStack.awake`; 0 before any input."""
        return [zeros / max(1, self.documents) for zeros in self._zeros]


@torch.no_grad()
def prune(stack: PredictorStack, counts: ZeroCounts, share: float, optimizer: torch.optim.Optimizer) -> None:
    """Takes idle neurons out, and starts the counts anew.

    The networks of one predictor have the same outputs, which are multiplied and few: one goes from all networks, and
    only if one of them has left it at zero throughout. A network's only output stays.

    Args:
        stack: changed in place.
        counts: of it.
        share: of the first two layers' neurons, as many as there were at first, that stay: the busiest.
        optimizer: whose state of the neurons is zeroed too.
    """
    low, middle, top = counts.frequencies()
    for awake, frequency in zip(stack.awake, (low, middle), strict=False):
        few = max(LEAST_WIDTH, round(share * awake.shape[-1]))
        awake &= _busiest(frequency.masked_fill(~awake, 2.0), few)
    outputs, idle = stack.awake[2], top.amax(1, keepdim=True).expand_as(top).masked_fill(~stack.awake[2], 2.0)
    outputs &= (idle < 1.0) | _busiest(idle, LEAST_WIDTH)
    columns = (None, *stack.inputs_awake())
    for matrix, awake, read in zip(stack.matrices, stack.awake, columns, strict=True):
        there = awake[..., None] if read is None else awake[..., None] & read[..., None, :]
        matrix.mul_(there)
        for value in optimizer.state.get(matrix, {}).values():
            if isinstance(value, Tensor) and value.shape == matrix.shape:
                value *= there
    counts.reset()


def _busiest(frequency: Tensor, few: int) -> Tensor:
    """So many neurons of lowest zero frequency in each network; bool, as `frequency`."""
    chosen = frequency.argsort(dim=-1, stable=True)[..., :few]
    return torch.zeros_like(frequency, dtype=torch.bool).scatter(-1, chosen, True)
