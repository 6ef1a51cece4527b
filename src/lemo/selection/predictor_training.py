"""Trains MLPs' predictors on activations of the frozen model (paper section 4.3), shrinking them as they go.

Documents stream by: the newest are kept for the next steps and then forgotten. Nothing goes back through the language
model. The predictors of all layers train at once, each on its own scores (`lemo.selection.predictor_stack`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.selection.elastic import ZeroCounts, prune
from lemo.selection.examples import Example, keep_newest
from lemo.selection.predictor import ActivityPredictor
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.predictor_stack import PredictorStack
from lemo.selection.score_errors import log_error, log_score, mean_score, order_error
from lemo.selection.scores import block_means

# What the loss's parts count.
_ORDER, _LOGARITHMS = 1.0, 0.3
# Share of the steps in which neurons go; the others mend what was cut.
_PRUNED_BY = 0.75
# Neurons at zero are counted in every so manieth step: some documents tell enough, but none would tell nothing.
_COUNT_EVERY = 4


class PredictorTraining:
    """Predictors of all layers on their way.

    Args:
        predictors: one a layer, on the device they train on.
        block_size: tokens per block.
        config: steps and prunings.
        seed: of the draws from memory.
    """

    def __init__(
        self, predictors: Sequence[ActivityPredictor], block_size: int, config: PredictorConfig, seed: int = 0
    ) -> None:
        self.stack = PredictorStack(predictors)
        self.config = config
        self.block_size = block_size
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: deque[Example] = deque()
        self._optimizer = torch.optim.AdamW(
            self.stack.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._counts = ZeroCounts(self.stack)

    @torch.enable_grad()
    def see(self, example: Example, steps: int) -> None:
        """Takes a document in and makes some steps; the first one also says what inputs and scores are like."""
        if self.step == 0 and not self._memory:
            self.stack.measure(example.x, example.exact)
            self._begin_at_the_mean(example.x)
        self._memory.append(example)
        keep_newest(self._memory, self.config.memory_gib)
        for _ in range(min(steps, self.config.steps - self.step)):
            self._train()

    def finish(self) -> list[ActivityPredictor]:
        """The predictors, trained and as wide as they have become."""
        return self.stack.finish()

    @torch.no_grad()
    def _begin_at_the_mean(self, x: Tensor) -> None:
        """Scales the last matrices so that the first estimates have the scores' mean: far over it ReLUs die."""
        factor = 1 / mean_score(self.stack(x).top.float())
        self.stack.third.mul_(factor.nan_to_num(1.0, 1.0)[:, None, None])

    def _train(self) -> None:
        config = self.config
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        example = self._memory[int(torch.randint(len(self._memory), (), generator=self._generator))]
        self._optimizer.zero_grad(set_to_none=True)
        # No layer's loss depends on another's predictor.
        self._loss(example).sum().backward()
        self._clip()
        self._optimizer.step()
        self.step += 1
        last = max(1, int(_PRUNED_BY * config.steps))
        # Between two prunings neurons are counted at least once.
        if self.step == last or (self.step % config.prune_every == 0 and self.step + config.prune_every <= last):
            share = 1 - (1 - config.size) * self.step / last
            prune(self.stack, self._counts, share, self._optimizer)

    def _clip(self) -> None:
        """Each predictor's gradient to norm 1 at most: a document whose scores lie far off would throw it off too."""
        grads = [matrix.grad for matrix in self.stack.matrices if matrix.grad is not None]
        norm = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        factor = (1 / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= factor[:, None, None]

    def _loss(self, example: Example) -> Tensor:
        """Of each layer, [L]: the order of blocks, and the logarithms of blocks' and tokens' activities."""
        exact = example.exact / self.stack.scale[:, None]
        active = self.stack(example.x)
        if self.step % min(_COUNT_EVERY, self.config.prune_every) == 0:
            self._counts.add(active)
        found = active.top.to(torch.promote_types(active.top.dtype, torch.float32))
        blocks, wanted = (log_score(block_means(scores, self.block_size)) for scores in (found, exact))
        errors = log_error(blocks - wanted) + log_error(log_score(found) - log_score(exact))
        return _LOGARITHMS * errors + _ORDER * order_error(blocks, wanted, self._generator)
