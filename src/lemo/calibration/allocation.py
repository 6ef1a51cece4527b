"""Shares out an average keep among branches and layers.

A *unit* is a branch of a layer. Every rule works with the share of blocks a unit keeps; thresholds are read off the
sample's scores afterwards, which is the same choice: a share and a threshold give each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from lemo.calibration.config import LEAST
from lemo.types import Key

# Shares whose cost is measured, one unit at a time.
LEVELS = (0.75, 0.5, 0.25, LEAST)
# Algorithm 1: a finite difference takes an eighth of a unit's blocks away.
DELTA = 0.125
ROUNDS = 4


def threshold_of(score: Tensor, edge: Tensor, tokens: Tensor, keep: float) -> float:
    """The threshold that keeps that share of the sample's tokens, nearest from above; 0 if it is everything.

    Args:
        score: of the sample's blocks, [blocks], not negative.
        edge: bool [blocks], kept whatever they score.
        tokens: in each block.
        keep: share, in (0, 1].
    """
    if keep >= 1.0:
        return 0.0
    order = score[~edge].argsort(descending=True)
    ranked, sizes = score[~edge][order].double(), tokens[~edge][order].double()
    held = tokens[edge].sum() + sizes.cumsum(0)
    count = int((held < keep * tokens.sum()).sum()) + 1
    if count >= len(ranked):
        return 0.0
    # Between the last that is kept and the first that isn't.
    return float((ranked[count - 1] + ranked[count]) / 2)


def by_curves(costs: Mapping[Key, Mapping[float, float]], keep: float) -> dict[Key, float]:
    """Cheapest first: the steps of each unit's convex hull, in the order of what they cost for what they save.

    For costs that add up this is the best of all; they add up to more than their sum (docs/LOG.md), but in much the
    same order.

    Args:
        costs: unit -> share kept -> rise of the loss with everything else dense. What keeps all costs nothing.
        keep: average to be reached; the last step is taken in part.

    Returns:
        Share for each unit.
    """
    shares = dict.fromkeys(costs, 1.0)
    for unit, new, saved in steps_by_cost(costs):
        surplus = sum(shares.values()) - keep * len(shares)
        if surplus <= 1e-9:
            break
        shares[unit] = new if saved <= surplus else shares[unit] - surplus
    return shares


def steps_by_cost(costs: Mapping[Key, Mapping[float, float]]) -> list[tuple[Key, float, float]]:
    """(unit, new share, share saved) of every step down a unit's hull, cheapest for what it saves first."""
    steps = []
    for unit, curve in costs.items():
        points = [(1.0, 0.0), *sorted(((k, max(0.0, c)) for k, c in curve.items()), reverse=True)]
        at = 0
        while at + 1 < len(points):
            share, cost = points[at]
            rates = [(c - cost) / (share - k) for k, c in points[at + 1 :]]
            best = min(range(len(rates)), key=lambda i: (rates[i], -i))
            after = at + 1 + best
            steps.append((rates[best], unit, points[after][0], points[at][0] - points[after][0]))
            at = after
    # Python's sort is stable, and a hull's rates rise: a unit's steps stay in order.
    return [(unit, share, saved) for _, unit, share, saved in sorted(steps, key=lambda step: step[0])]


def algorithm1(
    first: Mapping[Key, float], keep: float, losses: Callable[[Mapping[Key, float]], Sequence[float]]
) -> dict[Key, float]:
    """The paper's Algorithm 1: thresholds from mean scores, improved by finite differences of the held-out loss.

    In each round every unit alone loses an eighth of its blocks, all others as they are. Where that costs more than on
    the average the unit gets more, elsewhere less, and the average is restored. The same sequences are used for all
    losses, so that their noise cancels in the differences; a difference counts by how far it exceeds its standard error
    over the sequences. The best round's shares are returned.

    Args:
        first: shares over the mean score.
        keep: average.
        losses: shares -> loss of each sequence of the sample.
    """
    shares = with_average(first, keep)
    best, best_loss = shares, fmean(losses(shares))
    step = 0.25
    for _ in range(ROUNDS):
        here = torch.tensor(losses(shares), dtype=torch.float64)
        slopes = {}
        for unit, share in shares.items():
            less = max(LEAST, share - DELTA)
            if less >= share:
                slopes[unit] = 0.0
                continue
            moved = torch.tensor(losses({**shares, unit: less}), dtype=torch.float64)
            rise = (moved - here) / (share - less)
            error = rise.std() / len(rise) ** 0.5 if len(rise) > 1 else torch.tensor(0.0)
            mean = float(rise.mean())
            slopes[unit] = mean * max(0.0, 1 - float(error) ** 2 / max(mean**2, 1e-30))
        # Costs differ by orders of magnitude: ranks are steadier than the slopes themselves.
        order = sorted(slopes, key=lambda unit: slopes[unit])
        pull = {unit: 2 * index / max(1, len(order) - 1) - 1 for index, unit in enumerate(order)}
        shares = with_average({unit: share + step * pull[unit] for unit, share in shares.items()}, keep)
        loss = fmean(losses(shares))
        if loss < best_loss:
            best, best_loss = shares, loss
        step *= 0.7
    return best


def with_average(shares: Mapping[Key, float], keep: float) -> dict[Key, float]:
    """All shares moved by one number, and held between an eighth and 1, so that their mean is `keep`."""
    low, high = -2.0, 2.0
    for _ in range(60):
        offset = (low + high) / 2
        mean = fmean([min(1.0, max(LEAST, share + offset)) for share in shares.values()])
        low, high = (offset, high) if mean < keep else (low, offset)
    return {unit: min(1.0, max(LEAST, share + high)) for unit, share in shares.items()}
