"""Trains predictors on activations of the frozen model (paper section 4.3), shrinking them as they go.

Documents stream by: the newest are kept for the next steps and then forgotten. Nothing goes back through the language
model. The predictors of all layers train at once, each on its own scores (`lemo.selection.predictor_stack`).

Attention's predictors learn the documents they see by heart long before they know what is asked of them. So in each
step a document's blocks begin at another of its tokens, for which scores come by the parts that blocks are made of, and
some numbers are left out.
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
from lemo.selection.predictor_blocks import Blocks, part_of, scores_of_blocks
from lemo.selection.predictor_stack import PredictorStack, mean_score

GIB = 2**30


@dataclass(frozen=True)
class Example:
    """One document as each layer saw it: its rows' normalised inputs and the exact scores.

    Attributes:
        x: [L, N, D].
        exact: pair scores of parts of blocks (`predictor_blocks.part_of`) [L, f, f], or activities of tokens [L, N].
    """

    x: Tensor
    exact: Tensor

    @property
    def bytes(self) -> int:
        """What it takes to keep it."""
        return sum(x.numel() * x.element_size() for x in (self.x, self.exact))


# What the loss's parts count.
_ORDER, _LOGARITHMS, _PAIRS = 1.0, 0.3, 0.3
# Pairs under so much of the mean are all the same.
_LEAST_PAIR = 0.05
# A block's score is compared with so many others' in a step.
_COMPARED_WITH = 64
# Share of the steps in which neurons go; the others mend what was cut.
_PRUNED_BY = 0.75
# Neurons at zero are counted in every so manieth step: some documents tell enough, but none would tell nothing.
_COUNT_EVERY = 4


class PredictorTraining:
    """Predictors of one branch of all layers on their way.

    Args:
        predictors: one a layer, on the device they train on.
        block_size: tokens per block.
        config: steps and prunings.
        seed: of the draws from memory.
        mass: whether attention's scores are softmax mass.
    """

    def __init__(
        self,
        predictors: Sequence[Predictor],
        block_size: int,
        config: PredictorConfig,
        seed: int = 0,
        mass: bool = False,
    ) -> None:
        self.stack = PredictorStack(predictors)
        self.config = config
        self.block_size = block_size
        self.part = part_of(block_size) if self.stack.pairs else block_size
        self.mass = mass
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        device = self.stack.center.device
        self._dropping = torch.Generator(device).manual_seed(seed) if self.stack.pairs else None
        self._memory: deque[Example] = deque()
        self._optimizer = torch.optim.AdamW(
            self.stack.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._counts = ZeroCounts(self.stack)

    @torch.enable_grad()
    def see(self, example: Example, steps: int) -> None:
        """Takes a document in and makes some steps; the first one also says what inputs and scores are like."""
        if self.step == 0 and not self._memory:
            blocks, exact = self._blocks_from(example, 0)
            self.stack.measure(example.x, exact)
            self._begin_at_the_mean(example.x, blocks)
        self._memory.append(example)
        while len(self._memory) > 1 and sum(d.bytes for d in self._memory) > self.config.memory_gib * GIB:
            self._memory.popleft()
        for _ in range(min(steps, self.config.steps - self.step)):
            self._train()

    def finish(self) -> list[Predictor]:
        """The predictors, trained and as wide as they have become."""
        return self.stack.finish()

    def _blocks_from(self, example: Example, part: int) -> tuple[Blocks, Tensor]:
        """The document from one of its parts on: its blocks, and pair scores [L, n, n] or activities of tokens."""
        tokens = example.x.shape[1] - part * self.part
        blocks = Blocks(tokens, self.block_size, part * self.part / self.block_size)
        if not self.stack.pairs:
            return blocks, example.exact
        exact = example.exact[:, part:, part:]
        sizes = None
        if self.mass:
            sizes = torch.full((exact.shape[-1],), float(self.part), device=exact.device)
            sizes[-1] = tokens - (len(sizes) - 1) * self.part
        return blocks, scores_of_blocks(exact, self.block_size // self.part, sizes)

    def _compared(self, scores: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
        """What is compared by its logarithm: attention's sums, which decide who is kept; or activities."""
        if self.stack.pairs:
            return (scores.sum(1) / blocks.count,)
        return blocks.mean(scores[..., None])[..., 0], scores

    @torch.no_grad()
    def _begin_at_the_mean(self, x: Tensor, blocks: Blocks) -> None:
        """Scales the last matrices so that the first estimates have the scores' mean: far over it ReLUs die."""
        active = self.stack(x, blocks)
        # Outputs of a pair are multiplied: each takes the root.
        factor = mean_score(self.stack.estimates(active)) ** (-1 / self.stack.third.shape[1])
        self.stack.third.mul_(factor.nan_to_num(1.0, 1.0)[:, None, None, None])

    def _train(self) -> None:
        config = self.config
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        example = self._memory[int(torch.randint(len(self._memory), (), generator=self._generator))]
        # Under two blocks nothing would be left to choose from.
        parts = self.block_size // self.part if example.x.shape[1] >= 3 * self.block_size else 1
        part = int(torch.randint(parts, (), generator=self._generator))
        self._optimizer.zero_grad(set_to_none=True)
        # No layer's loss depends on another's predictor.
        self._loss(example, part).sum().backward()
        self._clip()
        self._optimizer.step()
        self.step += 1
        last = max(1, int(_PRUNED_BY * config.steps))
        # Between two prunings neurons are counted at least once.
        if self.step == last or (self.step % config.prune_every == 0 and self.step + config.prune_every <= last):
            share = 1 - (1 - config.neurons) * self.step / last
            prune(self.stack, self._counts, share, self._optimizer)

    def _clip(self) -> None:
        """Each predictor's gradient to norm 1 at most: a document whose scores lie far off would throw it off too."""
        grads = [matrix.grad for matrix in self.stack.matrices if matrix.grad is not None]
        norm = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        factor = (1 / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= factor[:, None, None, None]

    def _loss(self, example: Example, part: int) -> Tensor:
        """Of each layer, [L]: the scores' order, their logarithms, and of attention the pairs they are sums of.

        Args:
            example: a document.
            part: where its blocks begin.
        """
        blocks, exact = self._blocks_from(example, part)
        exact = exact / self.stack.scale.view(-1, *[1] * (exact.dim() - 1))
        active = self.stack(example.x[:, part * self.part :], blocks, self._dropping)
        if self.step % min(_COUNT_EVERY, self.config.prune_every) == 0:
            self._counts.add(active)
        estimates = self.stack.estimates(active)
        logs, wanted = ([_log(s) for s in self._compared(scores, blocks)] for scores in (estimates, exact))
        errors = [_log_error(found - right) for found, right in zip(logs, wanted, strict=True)]
        loss = _LOGARITHMS * torch.stack(errors).sum(0)
        loss = loss + _ORDER * _order_error(logs[0], wanted[0], self._generator)
        if self.stack.pairs:
            loss = loss + _PAIRS * _pair_error(estimates, exact)
        return loss


def _log(score: Tensor) -> Tensor:
    return torch.log(score + 1e-3)


def _log_error(difference: Tensor) -> Tensor:
    """Variance of the logarithms' difference in the document, and a tenth of its squared mean, [L].

    The mean counts because thresholds are compared across documents.
    """
    return difference.var(-1, correction=0) + 0.1 * difference.mean(-1).square()


def _pair_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of the pairs' logarithms, mean over those that count, [L].

    A sum is mostly of its near pairs, and their squares would be nearly all of the pairs' own.
    """
    n = wanted.shape[-1]
    error = torch.log(found + _LEAST_PAIR) - torch.log(wanted + _LEAST_PAIR)
    return error.square().sum((1, 2)) / (n * (n + 1) / 2)


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
