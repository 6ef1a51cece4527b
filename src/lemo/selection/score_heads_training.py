"""Trains score heads on the frozen model's exact scores.

They begin as true heads and stay near them: at a rate of 0.3% of the weights' size they gain, at seven times it they
learn the documents by heart (docs/decisions/0009). Documents stream by, and the newest are kept. In each step the token
pair that makes an estimate is found anew, without gradients; the estimate is then computed from that pair alone. Exact
scores come by parts of blocks, so that blocks may begin anywhere in a document.

Shapes: L layers, N rows of one document, f its parts, n its blocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.selection.examples import Example, keep_newest
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.score_errors import log_error, log_score, mean_score, order_error, pair_error
from lemo.selection.score_heads import Rotate, ScoreHeads
from lemo.selection.scores import best_pairs

# What the loss's parts count.
_ORDER, _LOGARITHMS, _PAIRS = 0.2, 3.0, 1.0
# Parts under so many tokens cost more than they teach, and the kernel for scores has none.
_LEAST_PART = 16
# A document of more parts has larger ones: their pairs' queries and keys lie in memory together.
_MOST_PARTS = 512
# Biases begin where the model's are, often at zero: their rate is that of the matrices, so many times.
_BIAS_RATE = 10.0


def part_of(block_size: int, tokens: int) -> int:
    """Tokens of the parts of blocks whose scores are learned from: a quarter of a block, a half, or the whole."""
    for part in (block_size // 4, block_size // 2):
        if part >= _LEAST_PART and block_size % part == 0 and tokens <= part * _MOST_PARTS:
            return part
    return block_size


@dataclass(frozen=True)
class HeadsExample(Example):
    """One document as each layer's attention saw it.

    Attributes:
        exact: pair scores of parts of blocks, [L, f, f].
        rotate: positions heads of its rows, one a layer; layers share what that takes.
    """

    rotate: Sequence[Rotate]


class HeadsTraining:
    """Score heads of all layers on their way.

    Args:
        heads: one a layer, on the device they train on.
        windows: sliding window of each layer, or None.
        block_size: tokens per block.
        config: steps, rate and memory.
        still: layers whose heads don't train, since they are all of the layer's own, and exact.
        seed: of the draws.
    """

    def __init__(
        self,
        heads: Sequence[ScoreHeads],
        windows: Sequence[int | None],
        block_size: int,
        config: PredictorConfig,
        *,
        still: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        self.heads, self.windows, self.block_size, self.config = tuple(heads), tuple(windows), block_size, config
        self.step = 0
        self._scale: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: deque[HeadsExample] = deque()
        self._layers = [layer for layer in range(len(self.heads)) if layer not in still]
        groups = [group for layer in self._layers for group in _groups(self.heads[layer], config.head_rate)]
        self._rates = [group["lr"] for group in groups]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99)) if groups else None

    @torch.enable_grad()
    def see(self, example: HeadsExample, until: int) -> None:
        """Takes a document in and trains until so many steps have been made; the first one says the scores' unit."""
        if self._scale is None:
            self._scale = mean_score(example.exact).clamp(min=torch.finfo(torch.float32).tiny)
        self._memory.append(example)
        keep_newest(self._memory, self.config.memory_gib)
        while self._optimizer is not None and self.step < min(until, self.config.head_steps):
            self._train(self._optimizer)

    def finish(self) -> list[ScoreHeads]:
        """The heads, trained."""
        for heads in self.heads:
            heads.requires_grad_(False).forget()
        return list(self.heads)

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        factor = 0.5 * (1 + math.cos(math.pi * self.step / self.config.head_steps))
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        example = self._memory[self._draw(len(self._memory))]
        part = part_of(self.block_size, example.x.shape[1])
        # Under two blocks nothing would be left to choose from.
        parts = self.block_size // part if example.x.shape[1] >= 3 * self.block_size else 1
        first = self._draw(parts)
        optimizer.zero_grad(set_to_none=True)
        for layer in self._layers:
            # One layer's pairs in memory at a time.
            self._loss(example, layer, part, first).backward()
        optimizer.step()
        self.step += 1

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))

    def _loss(self, example: HeadsExample, layer: int, part: int, first: int) -> Tensor:
        """Of one layer: the order of block scores, their logarithms, and the pairs that they are sums of.

        Args:
            example: a document.
            part: tokens of its parts.
            first: the part where blocks begin.
        """
        assert self._scale is not None
        found = self._estimates(example, layer, part)[first:, first:] / self._scale[layer]
        wanted = example.exact[layer, first:, first:] / self._scale[layer]
        found, wanted = (blocks_of_parts(x, self.block_size // part)[None] for x in (found, wanted))
        logs, right = (log_score(x.sum(1) / x.shape[1]) for x in (found, wanted))
        loss = _ORDER * order_error(logs, right, self._generator) + _LOGARITHMS * log_error(logs - right)
        return (loss + _PAIRS * pair_error(found, wanted)).sum()

    def _estimates(self, example: HeadsExample, layer: int, part: int) -> Tensor:
        """Estimated pair scores of the document's parts, fp32 [f, f], differentiable in the heads."""
        q, k = self.heads[layer].positioned(example.x[layer].float(), example.rotate[layer])
        queries, keys, there = best_pairs(q.detach(), k.detach(), part, self.windows[layer])
        products = q[:, queries[there]].unflatten(0, (len(k), -1)) * k[:, None, keys[there]]
        best = products.sum(-1).relu().sum((0, 1))
        return torch.zeros_like(example.exact[layer]).masked_scatter(there, best)


def blocks_of_parts(exact: Tensor, parts: int) -> Tensor:
    """Pair scores of blocks from those of their parts, [n, n] of [f, f]; the last block may have fewer parts."""
    lacking = -exact.shape[0] % parts
    padded = torch.nn.functional.pad(exact, (0, lacking, 0, lacking))
    return padded.unflatten(1, (-1, parts)).unflatten(0, (-1, parts)).amax((1, 3))


def _groups(heads: ScoreHeads, rate: float) -> list[dict[str, Any]]:
    """The optimizer's: each tensor's rate is a share of its numbers' size."""
    groups: list[dict[str, Any]] = []
    heads.requires_grad_(True).forget()
    for side in (heads.query, heads.key):
        size = side.matrix.detach().std().item()
        groups += [
            {"params": [side.matrix], "lr": rate * size},
            {"params": [side.bias], "lr": _BIAS_RATE * rate * size},
        ]
        if side.gain is not None:
            groups.append({"params": [side.gain], "lr": rate * side.gain.detach().abs().mean().item()})
    return groups
