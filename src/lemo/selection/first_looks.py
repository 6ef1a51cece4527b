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
    from lemo.kernels.projection import FirstLook, HeadNorm


class FirstLooks:
    """Keeps what was folded last.

    Args:
        affine: gives the matrix [r, D] and what is added to its products [r], both of normalised inputs, fp32.
        heads: gives the norm of heads that the kernel is to do behind it, or None.
    """

    def __init__(
        self, affine: Callable[[], tuple[Tensor, Tensor]], heads: Callable[[], HeadNorm | None] | None = None
    ) -> None:
        self._affine, self._heads = affine, heads
        self._held: tuple[tuple[Any, ...], list[Tensor], FirstLook] | None = None
        self._held_heads: tuple[HeadNorm | None] | None = None

    def forget(self) -> None:
        """The matrix has changed, or the norm of heads."""
        self._held = self._held_heads = None

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

        # Waits for the device, which isn't to be each time where the branch's norm can train.
        if self._held_heads is None:
            self._held_heads = (None if self._heads is None else self._heads(),)
        first, offset = self._affine()
        matrix = (first * norm.weight.float()).to(dtype).contiguous()
        if norm.bias is not None:
            offset = offset + first @ norm.bias.float()
        return FirstLook(matrix, offset, matrix.float().sum(1) if norm.centered else None, norm.eps, *self._held_heads)
