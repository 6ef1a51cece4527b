"""Trains predictors on activations of the frozen model (paper section 4.3), shrinking them as they go.

Sequences stream by: a few are kept for the next steps and then forgotten. Nothing goes back through the language model.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.config import PredictorConfig
from lemo.selection.elastic import ZeroCounts, prune
from lemo.selection.predictor import AttentionPredictor, Blocks, Predictor
from lemo.selection.scores import attention_informativeness


@dataclass(frozen=True)
class Example:
    """One document: its rows' normalised inputs [N, D]; exact pair scores [n, n], or activities of its tokens [N]."""

    x: Tensor
    exact: Tensor


@dataclass(frozen=True)
class _Remembered:
    """A document with what each step on it needs of its exact scores, in units of the predictor's scale.

    `logs`: of each score that is compared by its logarithm.
    """

    x: Tensor
    blocks: Blocks
    exact: Tensor
    square: Tensor
    logs: tuple[Tensor, ...]


# Last documents that a step's document is drawn from.
MEMORY = 8
# Neurons at zero are counted in every so manieth step: some documents tell enough.
_COUNT_EVERY = 4


class PredictorTraining:
    """One predictor on its way.

    Args:
        predictor: what is trained, on its device.
        block_size: tokens per block.
        config: steps and prunings; none of these in the last quarter, which mends what was cut.
        seed: of the draws from memory.
    """

    def __init__(self, predictor: Predictor, block_size: int, config: PredictorConfig, seed: int = 0) -> None:
        self.predictor = predictor
        self.config = config
        self.block_size = block_size
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: deque[_Remembered] = deque(maxlen=MEMORY)
        self._optimizer = torch.optim.AdamW(
            predictor.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._counts = {name: ZeroCounts(network) for name, network in predictor.by_name.items()}

    @torch.enable_grad()
    def see(self, example: Example, steps: int) -> None:
        """Takes a document in and makes some steps; the first one also says what inputs and scores are like."""
        if self.step == 0 and not self._memory:
            self.predictor.measure(example.x, _mean_score(example.exact))
            self._begin_at_the_mean(example)
        self._memory.append(self._remember(example))
        for _ in range(min(steps, self.config.steps - self.step)):
            self._train()

    def _remember(self, example: Example) -> _Remembered:
        exact = example.exact / self.predictor.scale
        blocks = Blocks(example.x.shape[0], self.block_size)
        compared = tuple(_log(score) for score in self._compared(exact, blocks))
        return _Remembered(example.x, blocks, exact, exact.square().sum().clamp(min=1e-12), compared)

    def _compared(self, scores: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
        """What is compared by its logarithm: attention's sums, which decide who is kept; or activities."""
        if isinstance(self.predictor, AttentionPredictor):
            return (attention_informativeness(scores, causal=False),)
        return blocks.mean(scores[:, None])[:, 0], scores

    @torch.no_grad()
    def _begin_at_the_mean(self, example: Example) -> None:
        """Scales the last matrices so that the first estimates have the scores' mean: far over it ReLUs die."""
        found = self.predictor.activations(example.x, Blocks(example.x.shape[0], self.block_size))
        networks = self.predictor.by_name.values()
        # Outputs of a pair are multiplied: each takes the root.
        factor = _mean_score(self.predictor.estimates(found)) ** (-1 / len(networks))
        for network in networks:
            network.matrices[-1].mul_(factor.nan_to_num(1.0, 1.0))

    def _train(self) -> None:
        config = self.config
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        drawn = int(torch.randint(len(self._memory), (), generator=self._generator))
        loss = self._loss(self._memory[drawn])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # A document whose scores lie far from the others' would throw the small networks off.
        torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        if self.step % config.prune_every == 0 and self.step <= 0.75 * config.steps:
            prune(self.predictor, self._counts, config.prune_above, self._optimizer)

    def _loss(self, example: _Remembered) -> Tensor:
        found = self.predictor.activations(example.x, example.blocks)
        if self.step % _COUNT_EVERY == 0:
            for name, activations in found.items():
                self._counts[name].add(activations)
        estimates = self.predictor.estimates(found).float()
        compared = zip(self._compared(estimates, example.blocks), example.logs, strict=True)
        loss = sum((_log_error(_log(score) - log) for score, log in compared), start=estimates.new_zeros(()))
        if isinstance(self.predictor, AttentionPredictor):
            # Where scores lie: of the pairs a few are large.
            loss = loss + (estimates - example.exact).square().sum() / example.square
        return loss


def _log(score: Tensor) -> Tensor:
    return torch.log(score + 1e-3)


def _log_error(difference: Tensor) -> Tensor:
    """Variance of the logarithms' difference in the document, which decides the order in it, and a tenth of its mean.

    The mean counts because thresholds are compared across documents.
    """
    return difference.var(correction=0) + 0.1 * difference.mean().square()


def _mean_score(exact: Tensor) -> Tensor:
    """Mean of the scores that count: of pairs, those on and under the diagonal."""
    if exact.dim() == 1:
        return exact.mean()
    n = exact.shape[0]
    return exact.sum() / (n * (n + 1) / 2)


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
