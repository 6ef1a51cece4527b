"""The plain torch twin of every kernel: slow, of quadratic size, and plainly what it says."""

from __future__ import annotations

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
