"""Trains predictors on activations of the frozen model (paper section 4.3), shrinking them as they go.

Sequences stream by: a few are kept for the next steps and then forgotten. Nothing goes back through the language model.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.selection.elastic import ZeroCounts, prune
from lemo.selection.predictor import AttentionPredictor, Blocks, LowRankNetwork, Predictor
from lemo.selection.scores import attention_informativeness


@dataclass(frozen=True)
class Example:
    """One document: its rows' normalised inputs [N, D]; exact pair scores [n, n], or activities of its tokens [N]."""

    x: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long and how fast predictors are trained.

    Attributes:
        steps: in all.
        learning_rate: at the start; falls to zero along a cosine.
        weight_decay: of AdamW.
        prune_every: steps between prunings; none in the last quarter, which mends what was cut.
        prune_above: zero frequency over which a neuron is taken out.
        memory: last documents that a step's document is drawn from.
    """

    steps: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    prune_every: int = 64
    prune_above: float = 0.65
    memory: int = 8


class PredictorTraining:
    """One predictor on its way.

    Args:
        predictor: what is trained, on its device.
        block_size: tokens per block.
        schedule: steps and prunings.
        seed: of the draws from memory.
    """

    def __init__(self, predictor: Predictor, block_size: int, schedule: Schedule, seed: int = 0) -> None:
        self.predictor = predictor
        self.schedule = schedule
        self.block_size = block_size
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: deque[Example] = deque(maxlen=schedule.memory)
        self._optimizer = torch.optim.AdamW(
            predictor.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self._counts: dict[str, ZeroCounts] = {}
        for name, network in predictor.networks.items():
            assert isinstance(network, LowRankNetwork)
            self._counts[name] = ZeroCounts(network)

    @torch.enable_grad()
    def see(self, example: Example, steps: int) -> None:
        """Takes a document in and makes some steps; the first one also says what inputs and scores are like."""
        if self.step == 0 and not self._memory:
            self.predictor.measure(example.x, _mean_score(example.exact))
            self._begin_at_the_mean(example)
        self._memory.append(example)
        for _ in range(min(steps, self.schedule.steps - self.step)):
            self._train()

    @torch.no_grad()
    def _begin_at_the_mean(self, example: Example) -> None:
        """Scales the last matrices so that the first estimates have the scores' mean: far over it ReLUs die."""
        found = self.predictor.activations(example.x, Blocks(example.x.shape[0], self.block_size))
        outputs = [activations[-1] for activations in found.values()]
        if len(outputs) == 2:
            pairs = (outputs[0] @ outputs[1].T).tril()
            factor = _mean_score(pairs).rsqrt()
        else:
            factor = 1 / outputs[0].mean()
        for network in self.predictor.networks.values():
            assert isinstance(network, LowRankNetwork)
            network.matrices[-1].mul_(factor.nan_to_num(1.0, 1.0))

    def _train(self) -> None:
        schedule = self.schedule
        rate = schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / schedule.steps))
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
        if self.step % schedule.prune_every == 0 and self.step <= 0.75 * schedule.steps:
            prune(self.predictor, self._counts, schedule.prune_above, self._optimizer)

    def _loss(self, example: Example) -> Tensor:
        predictor = self.predictor
        found = predictor.activations(example.x, Blocks(example.x.shape[0], self.block_size))
        for name, activations in found.items():
            self._counts[name].add(activations)
        exact = example.exact / predictor.scale
        if isinstance(predictor, AttentionPredictor):
            pairs = (found["query"][-1] @ found["key"][-1].T).tril()
            # Who is kept is decided by the sums; where scores lie by the pairs, of which a few are large.
            by_pair = (pairs - exact).square().sum() / exact.square().sum().clamp(min=1e-12)
            sums = (attention_informativeness(scores, causal=False) for scores in (pairs, exact))
            return by_pair + _log_error(*sums)
        tokens = found["activity"][-1].float()
        blocks = Blocks(len(exact), self.block_size)
        by_block = _log_error(*(blocks.mean(x)[:, 0] for x in (tokens, exact[:, None])))
        return by_block + _log_error(tokens[:, 0], exact)


def _log_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Variance of the logarithms' difference in the document, which decides the order in it, and a tenth of its mean.

    The mean counts because thresholds are compared across documents.
    """
    difference = torch.log(found + 1e-3) - torch.log(wanted + 1e-3)
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
