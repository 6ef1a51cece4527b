"""Attention of selected query rows, forward and backward, in Triton.

Query n sees the keys lo[n] ... hi[n]; both ascend with n. That says everything about causality, documents, padding,
sliding windows and compaction, so the kernels know nothing of them, and no mask of N·M numbers exists. A tile of keys
that all its queries see is computed without a mask; one that none sees isn't touched.

N queries, M keys, H query heads, K key/value heads (H a multiple of K), d head size. FlashAttention-2's algorithm:
running maximum and sum over key tiles in the forward, probabilities rebuilt from them in the backward.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.tiles import (
    LOG2_E,
    key_step,
    load_tile,
    power_of_2,
    query_step,
    softmax_step,
    store_tile,
    tiles_of,
)

# Of one tile. Kept rows ascend, so 64 of them lie close together and the tile's bounds are tight.
_ROWS, _KEYS = 64, 64


def attention_forward(
    q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, lo_N: Tensor, hi_N: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention.

    Args:
        q_HNd, k_KMd, v_KMd: one dtype, any strides; d at most 256.
        lo_N, hi_N: int32, first and last key each query sees; ascending.
        scale: factor on q·k.

    Returns:
        Output [N, H, d], contiguous, in the inputs' dtype; logarithm (base 2) of each softmax's denominator,
        fp32 [H, N].
    """
    H, N, d = q_HNd.shape
    out = torch.empty(N, H, d, device=q_HNd.device, dtype=q_HNd.dtype)
    lse = torch.empty(H, N, device=q_HNd.device, dtype=torch.float32)
    if N:
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            _forward[(tiles_of(N, _ROWS), H)](
                q_HNd, k_KMd, v_KMd, out, lse, lo_N, hi_N,
                scale * LOG2_E, N,
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), out.stride(1), out.stride(0),
                **_constants(q_HNd, k_KMd),
            )  # fmt: skip
    return out, lse


def attention_backward(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    out_NHd: Tensor,
    lse_HN: Tensor,
    lo_N: Tensor,
    hi_N: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [H, N, d], keys and values [K, M, d], in their dtypes; keys that nobody sees get zeros."""
    H, N, _ = q_HNd.shape
    K, M, _ = k_KMd.shape
    grad_NHd = grad_NHd.contiguous()
    delta = torch.empty_like(lse_HN)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q_HNd, k_KMd, v_KMd))
    # Two tiles in flight, not three: 360 against 303 TFLOP/s on an H100 at d = 128; the forward is faster with three.
    constants = _constants(q_HNd, k_KMd) | {"num_stages": 2}
    strides = (*q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0))
    with torch.cuda.device_of(q_HNd):
        if N:
            _backward_queries[(tiles_of(N, _ROWS), H)](
                q_HNd, k_KMd, v_KMd, out_NHd, grad_NHd, lse_HN, delta, dq, lo_N, hi_N,
                scale * LOG2_E, scale, N, *strides, *dq.stride(),
                **constants,
            )  # fmt: skip
        _backward_keys[(tiles_of(M, _KEYS), K)](
            q_HNd, k_KMd, v_KMd, grad_NHd, lse_HN, delta, dk, dv, lo_N, hi_N,
            scale * LOG2_E, scale, N, M, *strides, *dk.stride(),
            **constants,
        )  # fmt: skip
    return dq, dk, dv


def _constants(q_HNd: Tensor, k_KMd: Tensor) -> dict[str, object]:
    d = q_HNd.shape[-1]
    return {
        "GROUP": q_HNd.shape[0] // k_KMd.shape[0],
        "D": d,
        "BD": max(16, power_of_2(d)),
        "BM": _ROWS,
        "BN": _KEYS,
        # Tensor cores round fp32 to 10 bits of mantissa; fp32 is for those who want it exact.
        "PRECISION": "ieee" if q_HNd.dtype == torch.float32 else "tf32",
        "num_warps": 4,
    }


@triton.jit
def _bounds(LO, HI, rows, N):
    """First and last key of each row; rows past the end see none."""
    live = rows < N
    lo = tl.load(LO + rows, mask=live, other=2147483647)
    hi = tl.load(HI + rows, mask=live, other=-1)
    return live, lo, hi


@triton.jit
def _key_ranges(lo, hi, live, BN: tl.constexpr):
    """Key tiles from `begin` to `end`, of which those from `full` to `edge` are seen by every row."""
    begin = tl.min(lo) // BN * BN
    end = tl.max(hi) + 1
    seen_first = tl.max(tl.where(live, lo, 0))
    seen_end = tl.min(tl.where(live, hi, 2147483646)) + 1
    full = tl.maximum((seen_first + BN - 1) // BN * BN, begin)
    edge = tl.maximum(seen_end // BN * BN, full)
    return begin, full, edge, end


@triton.jit
def _attend_keys(
    q, Kh, Vh, lo, hi, start, stop, limit, scale_log2, m, l, acc,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n in range(start, stop, BN):
        keys = n + tl.arange(0, BN)
        k = load_tile(Kh, keys, limit, skm, skd, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), s, float("-inf"))
        v = load_tile(Vh, keys, limit, svm, svd, D, BD)
        m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    return m, l, acc


@triton.jit
def _forward(
    Q, K, V, O, LSE, LO, HI,
    scale_log2, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The last rows see most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    live, lo, hi = _bounds(LO, HI, rows, N)
    begin, full, edge, end = _key_ranges(lo, hi, live, BN)
    q = load_tile(Q + h * sqh, rows, N, sqn, sqd, D, BD)
    Kh, Vh = K + h // GROUP * skh, V + h // GROUP * svh
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    m, l, acc = _attend_keys(
        q, Kh, Vh, lo, hi, begin, tl.minimum(full, end), end, scale_log2, m, l, acc, skm, skd, svm, svd,
        D, BD, BN, PRECISION, True,
    )  # fmt: skip
    m, l, acc = _attend_keys(
        q, Kh, Vh, lo, hi, full, edge, end, scale_log2, m, l, acc, skm, skd, svm, svd,
        D, BD, BN, PRECISION, False,
    )  # fmt: skip
    m, l, acc = _attend_keys(
        q, Kh, Vh, lo, hi, edge, end, end, scale_log2, m, l, acc, skm, skd, svm, svd,
        D, BD, BN, PRECISION, True,
    )  # fmt: skip
    # Rows past the end have seen nothing.
    l = tl.where(live, l, 1.0)
    store_tile(O + h * soh, acc / l[:, None], rows, N, son, 1, D, BD)
    tl.store(LSE + h * N + rows, tl.where(live, m, 0.0) + tl.log2(l), mask=live)


@triton.jit
def _query_gradient(
    q, do, lse, delta, Kh, Vh, lo, hi, start, stop, limit, scale_log2, dq,
    skm, skd, svm, svd,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n in range(start, stop, BN):
        keys = n + tl.arange(0, BN)
        k = load_tile(Kh, keys, limit, skm, skd, D, BD)
        v = load_tile(Vh, keys, limit, svm, svd, D, BD)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), p, 0.0)
        dq = query_step(p, do, delta, k, v, dq, PRECISION)
    return dq


@triton.jit
def _backward_queries(
    Q, K, V, O, DO, LSE, DELTA, DQ, LO, HI,
    scale_log2, scale, N,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    live, lo, hi = _bounds(LO, HI, rows, N)
    begin, full, edge, end = _key_ranges(lo, hi, live, BN)
    q = load_tile(Q + h * sqh, rows, N, sqn, sqd, D, BD)
    do = load_tile(DO + h * soh, rows, N, son, 1, D, BD)
    out = load_tile(O + h * soh, rows, N, son, 1, D, BD)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h * N + rows, delta, mask=live)
    lse = tl.load(LSE + h * N + rows, mask=live, other=0.0)
    Kh, Vh = K + h // GROUP * skh, V + h // GROUP * svh
    dq = tl.zeros([BM, BD], tl.float32)
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, lo, hi, begin, tl.minimum(full, end), end, scale_log2, dq, skm, skd, svm, svd,
        D, BD, BN, PRECISION, True,
    )  # fmt: skip
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, lo, hi, full, edge, end, scale_log2, dq, skm, skd, svm, svd,
        D, BD, BN, PRECISION, False,
    )  # fmt: skip
    dq = _query_gradient(
        q, do, lse, delta, Kh, Vh, lo, hi, edge, end, end, scale_log2, dq, skm, skd, svm, svd,
        D, BD, BN, PRECISION, True,
    )  # fmt: skip
    store_tile(DQ + h * sgh, dq * scale, rows, N, sgn, sgd, D, BD)


@triton.jit
def _count_below(X, N, value):
    """How many of the ascending X[0:N] are smaller than `value`."""
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        below = tl.load(X + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _key_gradient(
    k, v, keys, Qh, DOh, LSEh, DELTAh, LO, HI, start, stop, N, scale_log2, dk, dv,
    sqn, sqd, son,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n in range(start, stop, BM):
        rows = n + tl.arange(0, BM)
        q = load_tile(Qh, rows, N, sqn, sqd, D, BD)
        do = load_tile(DOh, rows, N, son, 1, D, BD)
        lse = tl.load(LSEh + rows, mask=rows < N, other=0.0)
        delta = tl.load(DELTAh + rows, mask=rows < N, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
        if MASKED:
            _, lo, hi = _bounds(LO, HI, rows, N)
            p = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] <= hi[None, :]), p, 0.0)
        dk, dv = key_step(p, q, do, delta, v, dk, dv, PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    Q, K, V, DO, LSE, DELTA, DK, DV, LO, HI,
    scale_log2, scale, N, M,
    sqh, sqn, sqd, skh, skm, skd, svh, svm, svd, soh, son, sgh, sgn, sgd,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by most rows.
    first = tl.program_id(0) * BN
    kv = tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, BN)
    last = tl.minimum(first + BN, M) - 1
    # Rows [seen, unseen) see some key of the tile, rows [whole, partly) all of them.
    seen, unseen = _count_below(HI, N, first), _count_below(LO, N, last + 1)
    whole, partly = _count_below(HI, N, last), _count_below(LO, N, first + 1)
    begin = seen // BM * BM
    full = tl.maximum((whole + BM - 1) // BM * BM, begin)
    edge = tl.maximum(partly // BM * BM, full)
    k = load_tile(K + kv * skh, keys, M, skm, skd, D, BD)
    v = load_tile(V + kv * svh, keys, M, svm, svd, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for g in range(GROUP):
        h = kv * GROUP + g
        Qh, DOh, LSEh, DELTAh = Q + h * sqh, DO + h * soh, LSE + h * N, DELTA + h * N
        dk, dv = _key_gradient(
            k, v, keys, Qh, DOh, LSEh, DELTAh, LO, HI, begin, tl.minimum(full, unseen), N, scale_log2, dk, dv,
            sqn, sqd, son, D, BD, BM, PRECISION, True,
        )  # fmt: skip
        dk, dv = _key_gradient(
            k, v, keys, Qh, DOh, LSEh, DELTAh, LO, HI, full, edge, N, scale_log2, dk, dv,
            sqn, sqd, son, D, BD, BM, PRECISION, False,
        )  # fmt: skip
        dk, dv = _key_gradient(
            k, v, keys, Qh, DOh, LSEh, DELTAh, LO, HI, edge, unseen, N, scale_log2, dk, dv,
            sqn, sqd, son, D, BD, BM, PRECISION, True,
        )  # fmt: skip
    store_tile(DK + kv * sgh, dk * scale, keys, M, sgn, sgd, D, BD)
    store_tile(DV + kv * sgh, dv, keys, M, sgn, sgd, D, BD)
