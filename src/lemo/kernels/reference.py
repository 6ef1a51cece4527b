"""The plain torch twin of every kernel: slow, of quadratic size, and plainly what it says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, lo_N: Tensor, hi_N: Tensor, scale: float) -> Tensor:
    """Softmax attention of query n over the keys lo[n] ... hi[n]; [N, H, d]. Differentiable.

    Args:
        q_HNd, k_KMd, v_KMd: H a multiple of K.
        lo_N, hi_N: int, first and last key of each query.
        scale: factor on q·k.
    """
    groups = q_HNd.shape[0] // k_KMd.shape[0]
    k_HMd, v_HMd = k_KMd.repeat_interleave(groups, 0), v_KMd.repeat_interleave(groups, 0)
    keys = torch.arange(k_KMd.shape[1], device=q_HNd.device)
    seen_NM = (keys >= lo_N[:, None]) & (keys <= hi_N[:, None])
    scores_HNM = (q_HNd @ k_HMd.transpose(1, 2) * scale).masked_fill(~seen_NM, float("-inf"))
    return (scores_HNM.softmax(-1) @ v_HMd).transpose(0, 1)


class PlainAttention:
    """Attention without a mask that shows its denominators, natural logarithms [K, rows]; twin of a library's.

    The backward takes the output and denominators of a softmax over these keys and others, if there are others: what
    it gives is these keys' share of the gradient.
    """

    @staticmethod
    def forward(q_Krd: Tensor, k_Kmd: Tensor, v_Kmd: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
        scores = q_Krd @ k_Kmd.transpose(1, 2) * scale
        return scores.softmax(-1) @ v_Kmd, scores.float().logsumexp(-1), None

    @staticmethod
    def backward(
        grad_Krd: Tensor,
        q_Krd: Tensor,
        k_Kmd: Tensor,
        v_Kmd: Tensor,
        out_Krd: Tensor,
        lse_Kr: Tensor,
        state: Any,
        scale: float,
    ) -> tuple[Tensor, ...]:
        p = (q_Krd @ k_Kmd.transpose(1, 2) * scale - lse_Kr[..., None]).exp().to(q_Krd.dtype)
        delta = (grad_Krd * out_Krd).sum(-1, keepdim=True)
        ds = p * (grad_Krd @ v_Kmd.transpose(1, 2) - delta) * scale
        return ds @ k_Kmd, ds.transpose(1, 2) @ q_Krd, p.transpose(1, 2) @ grad_Krd
