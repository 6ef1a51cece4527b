"""Documents that predictors learn from, of which the newest are kept.

Shapes: L layers, N rows of one document, D hidden size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

GIB = 2**30
ExampleT = TypeVar("ExampleT", bound="Example")


@dataclass(frozen=True)
class Example:
    """One document as each layer's branch saw it.

    Attributes:
        x: normalised inputs, [L, N, D].
        exact: what a predictor is to estimate: activities of MLPs [L, N], of attention more (`HeadsExample`).
    """

    x: Tensor
    exact: Tensor

    @property
    def bytes(self) -> int:
        """What it takes to keep it."""
        return sum(x.numel() * x.element_size() for x in (self.x, self.exact))


def keep_newest(documents: deque[ExampleT], gib: float) -> None:
    """Drops the oldest until the others take no more than so much memory; one stays."""
    while len(documents) > 1 and sum(d.bytes for d in documents) > gib * GIB:
        documents.popleft()
