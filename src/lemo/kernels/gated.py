"""SiLU of a gate times another projection, in one pass, and its gradients in another.

As modules compute it the activation is written and read again, and autograd keeps it beside gate and projection. Here
the backward makes it anew from the two, in registers. Arithmetic is fp32, offsets are int64.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launching import launch
from lemo.kernels.tiles import tiles_of

_BLOCK = 4096


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of the gate's shape.

    Args:
        gate, up: contiguous, of one shape and dtype.
    """
    out = torch.empty_like(gate)
    _launch(_silu_times, gate.numel(), gate, up, out)
    return out


def silu_times_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up.

    Args:
        grad: of the product, contiguous.
        gate, up: as they were given.
    """
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(_silu_times_backward, gate.numel(), grad, gate, up, of_gate, of_up)
    return of_gate, of_up


def _launch(kernel, count: int, *tensors: Tensor) -> None:
    launch(kernel, (tiles_of(count, _BLOCK),), *tensors, count, BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _places(count, BLOCK: tl.constexpr):
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return where, where < count


@triton.jit
def _silu_times(GATE, UP, OUT, count, BLOCK: tl.constexpr):
    where, here = _places(count, BLOCK)
    gate = tl.load(GATE + where, mask=here, other=0.0).to(tl.float32)
    up = tl.load(UP + where, mask=here, other=0.0).to(tl.float32)
    tl.store(OUT + where, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=here)


@triton.jit
def _silu_times_backward(GRAD, GATE, UP, OF_GATE, OF_UP, count, BLOCK: tl.constexpr):
    where, here = _places(count, BLOCK)
    grad = tl.load(GRAD + where, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(GATE + where, mask=here, other=0.0).to(tl.float32)
    up = tl.load(UP + where, mask=here, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    of_gate = grad * up * share * (1.0 + gate - silu)
    tl.store(OF_GATE + where, of_gate.to(OF_GATE.dtype.element_ty), mask=here)
    tl.store(OF_UP + where, (grad * silu).to(OF_UP.dtype.element_ty), mask=here)
