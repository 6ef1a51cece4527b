"""How far estimated scores are from exact ones, as what is trained counts it; and recall, as it is judged.

Shapes: L layers, n blocks of one document.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Pairs under so much of the mean are all the same.
_LEAST_PAIR = 0.05
# A block's score is compared with so many others' in a step.
_COMPARED_WITH = 64


def log_score(score: Tensor) -> Tensor:
    """Logarithm of scores in units of their mean."""
    return torch.log(score + 1e-3)


def log_error(difference: Tensor) -> Tensor:
    """Variance of the logarithms' difference in the document, and a tenth of its squared mean, [L].

    The mean counts because thresholds are compared across documents.
    """
    return difference.var(-1, correction=0) + 0.1 * difference.mean(-1).square()


def pair_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of the pairs' logarithms, mean over those that count, [L].

    A sum is mostly of its near pairs, and their squares would be nearly all of the pairs' own.
    """
    n = wanted.shape[-1]
    error = torch.log(found + _LEAST_PAIR) - torch.log(wanted + _LEAST_PAIR)
    return error.square().sum((1, 2)) / (n * (n + 1) / 2)


def order_error(found: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
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


def mean_score(exact: Tensor) -> Tensor:
    """Mean of each layer's scores that count, [L]: of pairs [L, n, n], those on and under the diagonal."""
    if exact.dim() == 2:
        return exact.mean(-1)
    n = exact.shape[-1]
    return exact.sum((-2, -1)) / (n * (n + 1) / 2)


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
