"""ReLU, of which the backward keeps a bit of each number; autograd keeps the numbers themselves.

In OPT's MLP nothing else needs them, as long as the linear after it is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lemo.kernels import reference
from lemo.kernels.dispatch import rectified_backend


def rectified(x: Tensor) -> Tensor:
    """`relu(x)`; differentiable."""
    return _Rectified.apply(x) if torch.is_grad_enabled() and x.requires_grad else F.relu(x)


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.by_kernel = rectified_backend(x) == "triton"
        if ctx.by_kernel:
            from lemo.kernels.rectified import rectify

            out, bits = rectify(x.contiguous())
        else:
            out, bits = reference.rectify(x)
        ctx.save_for_backward(bits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (bits,) = ctx.saved_tensors
        if ctx.by_kernel:
            from lemo.kernels.rectified import rectify_backward

            return rectify_backward(grad.contiguous(), bits)
        return reference.rectify_backward(grad, bits)
