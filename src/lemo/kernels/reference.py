"""The plain torch twin of every kernel: slow, of quadratic size, and plainly what it says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.kernels.dispatch import MOST_STRIDE, NEAR_STRIPS, STRIP


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


def block_sparse_attention(q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, bias_KNM: Tensor, scale: float) -> Tensor:
    """Softmax attention of each query over the keys it sees, 0 where it sees none; [N, H, d]. Differentiable.

    Args:
        q_HNd, k_KMd, v_KMd: H a multiple of K.
        bias_KNM: added to scores, -inf for keys that aren't seen; for each key head or, [1, N, M], for all.
        scale: factor on q·k.
    """
    H = q_HNd.shape[0]
    groups = H // k_KMd.shape[0]
    k_HMd, v_HMd = k_KMd.repeat_interleave(groups, 0), v_KMd.repeat_interleave(groups, 0)
    bias_HNM = bias_KNM.repeat_interleave(H // bias_KNM.shape[0], 0)
    scores_HNM = q_HNd @ k_HMd.transpose(1, 2) * scale + bias_HNM.to(q_HNd.dtype)
    # A softmax over nothing is NaN, and so would be its gradient.
    blind = (bias_HNM == float("-inf")).all(-1, keepdim=True)
    weights_HNM = scores_HNM.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return (weights_HNM @ v_HMd).transpose(0, 1)


def block_masses(
    q_HNd: Tensor, k_KTd: Tensor, lowest_N: Tensor, rows_N: Tensor, scale: float, key_block: int, looked: int
) -> Tensor:
    """Mean softmax mass that `looked` queries, each time, and the heads of a group give to key blocks, [K, n, blocks].

    Args:
        q_HNd, k_KTd: H a multiple of K.
        lowest_N, rows_N: the first and the last key that each query sees.
        scale: factor on q·k.
        key_block: tokens a block; the last one may have fewer.
        looked: queries of a query block.
    """
    K, T, _ = k_KTd.shape
    keys = torch.arange(T, device=q_HNd.device)
    unseen = (keys > rows_N[:, None]) | (keys < lowest_N[:, None])
    scores = q_HNd @ k_KTd.repeat_interleave(q_HNd.shape[0] // K, 0).transpose(1, 2) * scale
    mass = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    mass = torch.stack([part.sum(-1) for part in mass.split(key_block, 2)], -1)
    return mass.unflatten(1, (-1, looked)).unflatten(0, (K, -1)).mean((1, 3))


def block_pair_scores(
    q_HTd: Tensor,
    k_KTd: Tensor,
    scale: float,
    block_size: int,
    window: int | None,
    mass: bool = False,
    *,
    sampled: bool = False,
) -> Tensor:
    """Equations 1-2 of the paper for one document, [blocks, blocks]; 0 above the diagonal.

    Args:
        q_HTd, k_KTd: H a multiple of K.
        scale: factor on q·k.
        block_size: tokens a block; the last one may have fewer.
        window: sliding window in tokens, or None.
        mass: the softmax mass instead, mean over heads and the query block's rows.
        sampled: leaves out most of the distant strips of query blocks and weighs the others; not with mass.
    """
    assert not (mass and sampled)
    H, T, _ = q_HTd.shape
    scores = q_HTd @ k_KTd.repeat_interleave(H // k_KTd.shape[0], 0).transpose(1, 2) * scale
    position = torch.arange(T, device=q_HTd.device)
    distance = position[:, None] - position
    unseen = (distance < 0) | (distance >= (T if window is None else window))
    if mass:
        pair = scores.masked_fill(unseen, float("-inf")).softmax(-1).mean(0)
        return torch.stack(
            [
                torch.stack([part.sum() / len(rows) for part in rows.split(block_size, 1)])
                for rows in pair.split(block_size)
            ]
        )
    pair = scores.relu().mean(0).masked_fill(unseen, 0)
    blocks = -(-T // block_size)
    # Scores are positive or zero, so zero padding never wins a maximum.
    padded = torch.nn.functional.pad(pair, (0, blocks * block_size - T) * 2)
    found = padded.view(blocks, block_size, blocks, block_size).amax((1, 3))
    return _sample_(found, max(1, STRIP // block_size)) if sampled else found


def _sample_(scores: Tensor, side: int) -> Tensor:
    """Scores [blocks, blocks], in strips of `side`, after each square of them was left out or weighed."""
    strips = -(-len(scores) // side)
    for row in range(strips):
        for column in range(row + 1):
            # 1 below NEAR_STRIPS, 2 below twice that, ..., from the next multiple of the largest on.
            distance = max(0, row - (column + MOST_STRIDE - 1) // MOST_STRIDE * MOST_STRIDE)
            stride = min(2 ** (distance // NEAR_STRIPS).bit_length(), MOST_STRIDE)
            stands_for = 0 if row % stride else min(stride, strips - row)
            scores[row * side : (row + 1) * side, column * side : (column + 1) * side] *= stands_for
    return scores


def first_look(hidden_ND: Tensor, matrix_rD: Tensor, offset_r: Tensor, eps: float, centered: bool) -> Tensor:
    """What a predictor's first matrix makes of each row after its norm, [N, r].

    Args:
        hidden_ND: the residual stream.
        matrix_rD, offset_r: with the norm's weight and bias in them.
        eps, centered: the norm's (LayerNorm, or RMS norm).
    """
    return projected(hidden_ND, matrix_rD, offset_r, eps, centered).relu()


def projected(
    hidden_ND: Tensor,
    matrix_rD: Tensor,
    offset_r: Tensor,
    eps: float,
    centered: bool,
    heads: tuple[Tensor, float] | None = None,
) -> Tensor:
    """What a matrix makes of each row after its norm, [N, r]; other arguments as `first_look`'s.

    Args:
        heads: gain [heads, d] and eps of an RMS norm that each head of d numbers goes through.
    """
    x = hidden_ND - hidden_ND.mean(1, keepdim=True) if centered else hidden_ND
    x = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    y = x @ matrix_rD.T + offset_r
    if heads is None:
        return y
    gain, head_eps = heads
    y_NHd = y.unflatten(1, gain.shape)
    return (y_NHd / (y_NHd.square().mean(-1, keepdim=True) + head_eps).sqrt() * gain).flatten(1)


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


def gather_rows(x_TD: Tensor, rows_N: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x[rows]` in another dtype."""
    return x_TD[rows_N].to(dtype or x_TD.dtype)


def gather_norm(
    x_TD: Tensor,
    rows_N: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    centered: bool,
    dtype: torch.dtype,
    keep_rows: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The norm of `x[rows]` in fp32 or wider, and the rows themselves if asked for."""
    x_ND = x_TD if rows_N is None else x_TD[rows_N]
    y_ND = _standard(_wide(x_ND), eps, centered)[0] * _wide(weight_D)
    if bias_D is not None:
        y_ND = y_ND + _wide(bias_D)
    return y_ND.to(dtype), x_ND if keep_rows else None


def add_rows_(x_TD: Tensor, rows_N: Tensor, y_ND: Tensor) -> None:
    """`x[rows] += y`, summed in fp32 or wider."""
    x_TD[rows_N] = (_wide(x_TD[rows_N]) + _wide(y_ND)).to(x_TD.dtype)


def add_norm_gradient_(
    grad_TD: Tensor | None,
    rows_N: Tensor | None,
    grad_y_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    centered: bool,
    parameters: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the gradient that the norm's input gets to `grad[rows]`; gradients of weight and bias if asked for."""
    standard, reciprocal = _standard(_wide(x_ND), eps, centered)
    g, grad_y = _wide(grad_y_ND) * _wide(weight_D), _wide(grad_y_ND)
    if grad_TD is not None:
        change = g - standard * (g * standard).mean(1, keepdim=True)
        change = change - g.mean(1, keepdim=True) if centered else change
        rows_N = torch.arange(len(x_ND), device=x_ND.device) if rows_N is None else rows_N
        add_rows_(grad_TD, rows_N, change * reciprocal)
    return ((grad_y * standard).sum(0), grad_y.sum(0)) if parameters else (None, None)


def _standard(x_ND: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """Standardised rows, and the reciprocal of their standard deviation."""
    x_ND = x_ND - x_ND.mean(1, keepdim=True) if centered else x_ND
    reciprocal = (x_ND.square().mean(1, keepdim=True) + eps).rsqrt()
    return x_ND * reciprocal, reciprocal


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(
    q_NHd: Tensor, k_NKd: Tensor, cos_Td: Tensor, sin_Td: Tensor, rows_N: Tensor, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """`x * cos + (-second half, first half) * sin` of both, or the transpose of that map, in fp32 or wider."""
    cos, sin = (_wide(x[rows_N])[:, None] for x in (cos_Td, sin_Td))

    def turned(x: Tensor) -> Tensor:
        wide = _wide(x)
        first, second = (wide * sin if transposed else wide).chunk(2, -1)
        half = torch.cat((second, -first) if transposed else (-second, first), -1)
        return (wide * cos + (half if transposed else half * sin)).to(x.dtype)

    return turned(q_NHd), turned(k_NKd)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in fp32 or wider."""
    gate_wide = _wide(gate)
    return (gate_wide * gate_wide.sigmoid() * _wide(up)).to(gate.dtype)


def silu_times_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_wide, gate_wide = _wide(grad), _wide(gate)
    share = gate_wide.sigmoid()
    of_gate = grad_wide * _wide(up) * share * (1 + gate_wide * (1 - share))
    return of_gate.to(gate.dtype), (grad_wide * gate_wide * share).to(up.dtype)


def rectify(x: Tensor) -> tuple[Tensor, Tensor]:
    """`relu(x)` and where it passes x's gradient on, a bit each, uint8 [numbers / 8, rounded up]."""
    passed = torch.nn.functional.pad(~(x <= 0).flatten(), (0, -x.numel() % 8)).view(-1, 8)
    return x.relu(), (passed.to(torch.uint8) << _eight(x)).sum(1, dtype=torch.uint8)


def rectify_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """Gradient of x."""
    passed = ((bits[:, None] >> _eight(grad)) & 1).flatten()[: grad.numel()] == 1
    return torch.where(passed.view(grad.shape), grad, 0.0)


def _eight(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
