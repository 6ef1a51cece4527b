"""ReLU that keeps a bit of each number for its gradient, where autograd keeps the numbers; offsets are int64."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import tiles_of

# Bytes of bits of a program; each is eight numbers.
_BLOCK = 512


def rectify(x: Tensor) -> tuple[Tensor, Tensor]:
    """`relu(x)`, and where it passes x's gradient on, a bit each, uint8 [numbers / 8, rounded up].

    Args:
        x: contiguous; what isn't a number passes, as in torch.
    """
    out, bits = torch.empty_like(x), x.new_empty(tiles_of(x.numel(), 8), dtype=torch.uint8)
    _launch(_rectify, x, out, bits)
    return out, bits


def rectify_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """Gradient of x.

    Args:
        grad: of the output, contiguous.
        bits: as `rectify` made them.
    """
    of_x = torch.empty_like(grad)
    _launch(_rectify_backward, grad, of_x, bits)
    return of_x


def _launch(kernel, x: Tensor, out: Tensor, bits: Tensor) -> None:
    launch(kernel, (tiles_of(len(bits), _BLOCK),), x, out, bits, x.numel(), BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _places(count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = 8 * byte[:, None] + tl.arange(0, 8)[None, :]
    return byte, where, where < count


@triton.jit
def _rectify(X, OUT, BITS, count, BLOCK: tl.constexpr):
    byte, where, here = _places(count, BLOCK)
    x = tl.load(X + where, mask=here, other=0.0)
    stopped = x.to(tl.float32) <= 0.0
    tl.store(OUT + where, tl.where(stopped, 0.0, x).to(OUT.dtype.element_ty), mask=here)
    bits = tl.sum(tl.where(stopped, 0, 1) << tl.arange(0, 8)[None, :], 1)
    tl.store(BITS + byte, bits.to(tl.uint8), mask=8 * byte < count)


@triton.jit
def _rectify_backward(GRAD, OF_X, BITS, count, BLOCK: tl.constexpr):
    byte, where, here = _places(count, BLOCK)
    bits = tl.load(BITS + byte, mask=8 * byte < count, other=0).to(tl.int32)
    passed = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 1
    grad = tl.load(GRAD + where, mask=here, other=0.0)
    tl.store(OF_X + where, tl.where(passed, grad, 0.0).to(OF_X.dtype.element_ty), mask=here)
