"""A predictor's first matrix with the norm before it folded in, as kernels take it.

Shapes: r rows of the matrix, D hidden size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lemo.types import NormWeights

if TYPE_CHECKING:
    from lemo.kernels.projection import FirstLook


class FirstLooks:
    """Keeps what was folded last.

    Args:
        affine: gives the matrix [r, D] and what is added to its products [r], both of normalised inputs, fp32.
    """

    def __init__(self, affine: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._affine = affine
        self._held: tuple[tuple[Any, ...], list[Tensor], FirstLook] | None = None

    def forget(self) -> None:
        """The matrix has changed."""
        self._held = None

    def of(self, dtype: torch.dtype, norm: NormWeights) -> FirstLook:
        """For inputs before that norm. Made anew where the norm's weights have changed, and each time where they can
        train: fused optimizers leave a tensor's version alone."""
        weights = [x for x in (norm.weight, norm.bias) if x is not None]
        if any(x.requires_grad or x.is_inference() for x in weights):
            self._held = None
            return self._fold(dtype, norm)
        held, made_from = self._held, (dtype, norm.eps, *(x._version for x in weights))
        if held is None or held[0] != made_from or not all(map(operator.is_, held[1], weights)):
            held = self._held = (made_from, weights, self._fold(dtype, norm))
        return held[2]

    @torch.no_grad()
    def _fold(self, dtype: torch.dtype, norm: NormWeights) -> FirstLook:
        from lemo.kernels.projection import FirstLook

        first, offset = self._affine()
        matrix = (first * norm.weight.float()).to(dtype).contiguous()
        if norm.bias is not None:
            offset = offset + first @ norm.bias.float()
        return FirstLook(matrix, offset, matrix.float().sum(1) if norm.centered else None, norm.eps)
