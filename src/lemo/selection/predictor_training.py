"""Trains predictors on activations of the frozen model (paper section 4.3), shrinking them as they go.

Documents stream by: the newest are kept for the next steps and then forgotten. Nothing goes back through the language
model. The predictors of all layers train at once, each on its own scores (`lemo.selection.predictor_stack`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lemo.config import PredictorConfig
from lemo.selection.elastic import ZeroCounts, prune
from lemo.selection.predictor import Predictor
from lemo.selection.predictor_blocks import Blocks
from lemo.selection.predictor_stack import PredictorStack, mean_score

GIB = 2**30


@dataclass(frozen=True)
class Example:
    """One document as each layer saw it: its rows' normalised inputs and the exact scores.

    Attributes:
        x: [L, N, D].
        exact: pair scores [L, n, n], or activities of tokens [L, N].
    """

    x: Tensor
    exact: Tensor


@dataclass(frozen=True)
class _Remembered:
    """A document with what each step on it needs of its exact scores, in units of the predictors' scales.

    `logs`: of each score that is compared by its logarithm.
    """

    x: Tensor
    blocks: Blocks
    exact: Tensor
    square: Tensor
    logs: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.x, self.exact, *self.logs))


# What the loss's parts count.
_ORDER, _LOGARITHMS, _PAIRS = 1.0, 0.3, 0.1
# A block's score is compared with so many others' in a step.
_COMPARED_WITH = 64
# Neurons at zero are counted in every so manieth step: some documents tell enough.
_COUNT_EVERY = 4


class PredictorTraining:
    """Predictors of one branch of all layers on their way.

    Args:
        predictors: one a layer, on the device they train on.
        block_size: tokens per block.
        config: steps and prunings; none of these in the last quarter, which mends what was cut.
        seed: of the draws from memory.
    """

    def __init__(
        self, predictors: Sequence[Predictor], block_size: int, config: PredictorConfig, seed: int = 0
    ) -> None:
        self.stack = PredictorStack(predictors)
        self.config = config
        self.block_size = block_size
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: deque[_Remembered] = deque()
        self._optimizer = torch.optim.AdamW(
            self.stack.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._counts = ZeroCounts(self.stack)

    @torch.enable_grad()
    def see(self, example: Example, steps: int) -> None:
        """Takes a document in and makes some steps; the first one also says what inputs and scores are like."""
        if self.step == 0 and not self._memory:
            self.stack.measure(example.x, example.exact)
            self._begin_at_the_mean(example)
        self._memory.append(self._remember(example))
        while len(self._memory) > 1 and sum(d.bytes for d in self._memory) > self.config.memory_gib * GIB:
            self._memory.popleft()
        for _ in range(min(steps, self.config.steps - self.step)):
            self._train()

    def finish(self) -> list[Predictor]:
        """The predictors, trained and as wide as they have become."""
        return self.stack.finish()

    def _remember(self, example: Example) -> _Remembered:
        exact = example.exact / self.stack.scale.view(-1, *[1] * (example.exact.dim() - 1))
        blocks = Blocks(example.x.shape[1], self.block_size)
        logs = tuple(_log(score) for score in self._compared(exact, blocks))
        square = exact.square().flatten(1).sum(1).clamp(min=1e-12)
        return _Remembered(example.x, blocks, exact, square, logs)

    def _compared(self, scores: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
        """What is compared by its logarithm: attention's sums, which decide who is kept; or activities."""
        if self.stack.pairs:
            return (scores.sum(1) / blocks.count,)
        return blocks.mean(scores[..., None])[..., 0], scores

    @torch.no_grad()
    def _begin_at_the_mean(self, example: Example) -> None:
        """Scales the last matrices so that the first estimates have the scores' mean: far over it ReLUs die."""
        active = self.stack(example.x, Blocks(example.x.shape[1], self.block_size))
        # Outputs of a pair are multiplied: each takes the root.
        factor = mean_score(self.stack.estimates(active)) ** (-1 / self.stack.third.shape[1])
        self.stack.third.mul_(factor.nan_to_num(1.0, 1.0)[:, None, None, None])

    def _train(self) -> None:
        config = self.config
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        drawn = int(torch.randint(len(self._memory), (), generator=self._generator))
        self._optimizer.zero_grad(set_to_none=True)
        # No layer's loss depends on another's predictor.
        self._loss(self._memory[drawn]).sum().backward()
        self._clip()
        self._optimizer.step()
        self.step += 1
        if self.step % config.prune_every == 0 and self.step <= 0.75 * config.steps:
            prune(self.stack, self._counts, config.prune_above, self._optimizer)

    def _clip(self) -> None:
        """Each predictor's gradient to norm 1 at most: a document whose scores lie far off would throw it off too."""
        grads = [matrix.grad for matrix in self.stack.matrices if matrix.grad is not None]
        norm = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        factor = (1 / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= factor[:, None, None, None]

    def _loss(self, example: _Remembered) -> Tensor:
        """Of each layer, [L]: the scores' order, their logarithms, and of attention the pairs they are sums of."""
        active = self.stack(example.x, example.blocks)
        if self.step % _COUNT_EVERY == 0:
            self._counts.add(active)
        estimates = self.stack.estimates(active)
        logs = [_log(score) for score in self._compared(estimates, example.blocks)]
        errors = [_log_error(log - wanted) for log, wanted in zip(logs, example.logs, strict=True)]
        loss = _LOGARITHMS * torch.stack(errors).sum(0)
        loss = loss + _ORDER * _order_error(logs[0], example.logs[0], self._generator)
        if self.stack.pairs:
            # Of the pairs a few are large, which the sums alone don't say.
            loss = loss + _PAIRS * (estimates - example.exact).square().sum((1, 2)) / example.square
        return loss


def _log(score: Tensor) -> Tensor:
    return torch.log(score + 1e-3)


def _log_error(difference: Tensor) -> Tensor:
    """Variance of the logarithms' difference in the document, and a tenth of its squared mean, [L].

    The mean counts because thresholds are compared across documents.
    """
    return difference.var(-1, correction=0) + 0.1 * difference.mean(-1).square()


def _order_error(found: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Of pairs of blocks, how wrong their order is: the logistic loss of the difference, mean over pairs, [L].

    Args:
        found, wanted: logarithms of block scores, [L, n].
        generator: draws whom each block is compared with, where not with all.
    """
    n = found.shape[1]
    if n < 2:
        return found.new_zeros(len(found))
    offsets = torch.arange(1, n) if n - 1 <= _COMPARED_WITH else 1 + torch.randperm(n - 1, generator=generator)
    other = (torch.arange(n) + offsets[:_COMPARED_WITH, None]).remainder(n).to(found.device)
    unit = wanted.std(1, correction=0).clamp(min=1e-3)[:, None, None] / 4
    apart = (found[:, None] - found[:, other]) / unit
    order = torch.sign(wanted[:, None] - wanted[:, other])
    return (functional.softplus(-apart * order) * order.abs()).mean((1, 2))


def recall(predicted: Tensor, exact: Tensor, keep: float) -> float:
    """Share of a document's blocks with the highest exact scores that are among the highest predicted ones.

    Args:
        predicted, exact: block scores [n].
        keep: share of the blocks, in (0, 1].
    """
    k = max(1, round(keep * exact.numel()))
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    chosen[predicted.topk(k).indices] = True
    return float(chosen[exact.topk(k).indices].float().mean())
