"""The `segments` policy: each document cut into equal spans, some drawn uniformly, the same in all layers.

The loss over the drawn spans, weighted by spans / drawn, is unbiased for the loss over all labels; the gradient
isn't, since keys and values outside the drawn spans get none (DESIGN, issue "main job", part 3).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.config import Segments
from lemo.types import SequenceLayout, TokenPlan


@dataclass(frozen=True)
class DrawnSpans:
    """Spans drawn for one batch.

    Attributes:
        plan: their rows.
        ranges: drawn (first, end) rows of each document.
        weight: fp64 [B·T], spans / drawn of the row's document in drawn spans, 0 elsewhere.
        weights: the distinct nonzero values of `weight`.
    """

    plan: TokenPlan
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    weight: Tensor
    weights: tuple[float, ...]


def draw_spans(layout: SequenceLayout, segments: Segments, generator: random.Random) -> DrawnSpans:
    """Draws `segments.drawn` of each document's `segments.spans` spans without replacement.

    A document too short to fill all its spans has fewer, and its weight is spans it has / spans drawn.
    """
    weight = torch.zeros(layout.rows, dtype=torch.float64)
    weights: set[float] = set()
    ranges: list[tuple[tuple[int, int], ...]] = []
    cu_seqlens = [0]
    for first, end in layout.documents:
        span = -(-(end - first) // segments.spans)
        starts = range(first, end, span)
        drawn = sorted(generator.sample(starts, min(segments.drawn, len(starts))))
        ranges.append(tuple((start, min(start + span, end)) for start in drawn))
        weights.add(len(starts) / len(drawn))
        for start, stop in ranges[-1]:
            weight[start:stop] = len(starts) / len(drawn)
        cu_seqlens.append(cu_seqlens[-1] + sum(stop - start for start, stop in ranges[-1]))
    host_rows = weight.nonzero().flatten()
    device = layout.block_of_row.device
    plan = TokenPlan(
        host_rows.to(device), tuple(cu_seqlens), keep=len(host_rows) / layout.real_tokens, known_rows=host_rows
    )
    return DrawnSpans(plan, tuple(ranges), weight.to(device), tuple(sorted(weights)))
