"""Drawing a fixed number of things with unequal probabilities, none of them twice (systematic sampling).

A sum over what was drawn, each divided by its probability, estimates the sum over everything without bias. Its variance
is least if probabilities are in proportion to the sum's terms, and things next to each other are spread out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(weight: Tensor, count: Tensor) -> Tensor:
    """In proportion to weights where that stays below 1, else 1; they sum to `count`; fp32 [..., n].

    Args:
        weight: positive, or 0 for what can't be drawn, fp32 [..., n].
        count: how many are drawn, int64 [...], of no more than can be.
    """
    falling = weight.sort(-1, descending=True).values
    rest = falling.flip(-1).cumsum(-1).flip(-1)
    # With the m greatest certain, the others share what is left of the count.
    left = count[..., None] - torch.arange(weight.shape[-1], device=weight.device)
    fits = left * falling <= rest
    certain = fits.int().argmax(-1, keepdim=True)
    unit = rest.gather(-1, certain) / left.gather(-1, certain)
    return (weight / unit).clamp(max=1)


def draw_systematically(probability: Tensor, most: int, shift: Tensor) -> Tensor:
    """Indices of what is drawn, ascending, int64 [..., most]; past a row's own count they mean nothing.

    Args:
        probability: of each, [..., n].
        most: the largest count of a row, the sum of its probabilities.
        shift: in [0, 1), fp64 [..., 1]: the only random number of a row.
    """
    ends = probability.double().cumsum(-1)
    places = torch.arange(most, device=probability.device) + shift
    found = torch.searchsorted(ends, places.expand(*ends.shape[:-1], most).contiguous(), right=True)
    # Rounding may leave the last place past the last end.
    last = (probability > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return found.minimum(last)
