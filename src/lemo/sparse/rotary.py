"""Rotation of some rows' queries and keys by their positions, in one pass, under autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rotate(q_NHd: Tensor, k_NKd: Tensor, cos_Td: Tensor, sin_Td: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Positioned queries [H, N, d] and keys [K, N, d].

    Args:
        q_NHd, k_NKd: as they were projected, numbers of a head contiguous; of a dtype that kernels take.
        cos_Td, sin_Td: of all rows, contiguous; they don't train.
        rows_N: int64, which rows these are.
    """
    return _Rotate.apply(q_NHd, k_NKd, cos_Td, sin_Td, rows_N)


class _Rotate(Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, k_NKd: Tensor, cos_Td: Tensor, sin_Td: Tensor, rows_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        from lemo.kernels.rotary import rotate

        ctx.save_for_backward(cos_Td, sin_Td, rows_N)
        q_NHd, k_NKd = rotate(q_NHd, k_NKd, cos_Td, sin_Td, rows_N)
        return q_NHd.transpose(0, 1), k_NKd.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HNd: Tensor, grad_KNd: Tensor) -> tuple[Tensor | None, ...]:
        from lemo.kernels.rotary import rotate

        grads = (x.transpose(0, 1) for x in (grad_HNd, grad_KNd))
        of_q, of_k = (x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        return *rotate(of_q, of_k, *ctx.saved_tensors, transposed=True), None, None, None
