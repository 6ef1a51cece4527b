"""The softmax mass that a few queries of each query block give to each key block, in Triton.

One kernel takes a tile of these queries of one head, goes through the keys once, and stores for each key block the
logarithm of its mass but for the row's denominator, which it knows at the end; scores never exist. A second one reads
that once, divides, and takes means over the queries of a block and the heads of a group.

n query blocks, each with R queries that are looked at (N = n·R), T keys of one document in nk key blocks, H query
heads, K key heads, G = H/K, d head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.tiles import LOG2_E, load_tile, power_of_2, tiles_of

# Queries of a program of the first kernel, and keys of its tiles, which hold one block or several small ones.
QUERIES, KEYS = 64, 64
# Rows of a head of at most so many bytes leave room for a tile in flight.
ROW_BYTES = 256
# Key blocks of a program of the second kernel.
BLOCKS = 64


def block_masses(
    q_HNd: Tensor, k_KTd: Tensor, lowest_N: Tensor, rows_N: Tensor, scale: float, key_block: int, looked: int
) -> Tensor:
    """Mean softmax mass of each key block for each query block, fp32 [K, n, nk].

    Args:
        q_HNd, k_KTd: positioned queries and keys of one dtype, any strides; d at most 512 bytes.
        lowest_N, rows_N: the first and the last key that each query sees, int64, of which it sees all.
        scale: factor on q·k.
        key_block: a power of two from 16 to 128.
        looked: R, a power of two of at most 64.
    """
    H, N, d = q_HNd.shape
    K, T, _ = k_KTd.shape
    nk, n = tiles_of(T, key_block), N // looked
    log = torch.empty(H, n, nk, looked, device=q_HNd.device, dtype=torch.float32)
    lse = torch.empty(H, N, device=q_HNd.device, dtype=torch.float32)
    mass = torch.empty(K, n, nk, device=q_HNd.device, dtype=torch.float32)
    small = power_of_2(d) * q_HNd.element_size() <= ROW_BYTES
    keys = max(KEYS, key_block)
    if N:
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            _log_masses[(tiles_of(N, QUERIES), H)](
                q_HNd, k_KTd, lowest_N, rows_N, log, lse, scale * LOG2_E, N, T, nk,
                *q_HNd.stride(), *k_KTd.stride(),
                GROUP=H // K, LOOKED=looked, D=d, BD=max(16, power_of_2(d)),
                BM=QUERIES, BN=keys, PARTS=keys // key_block,
                PRECISION="ieee" if q_HNd.dtype == torch.float32 else "tf32",
                num_warps=4, num_stages=2 if small else 1,
            )  # fmt: skip
            _mean_masses[(tiles_of(nk, BLOCKS), n, K)](
                log, lse, lowest_N, rows_N, mass, N, nk,
                GROUP=H // K, LOOKED=looked, BN=key_block, BLOCKS=BLOCKS, num_warps=4,
            )  # fmt: skip
    return mass


@triton.jit
def _log_masses(
    Q, KEYS, LOWEST, ROWS, LOG, LSE, scale_log2, N, T, nk,
    sqh, sqn, sqd, skh, skm, skd,
    GROUP: tl.constexpr, LOOKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last queries see most: they go first.
    n = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    head = tl.program_id(1).to(tl.int64)
    live = n < N
    # Lanes past the end see what the last query sees.
    row = tl.load(ROWS + tl.minimum(n, N - 1)).to(tl.int32)
    lowest = tl.load(LOWEST + tl.minimum(n, N - 1)).to(tl.int32)
    q = load_tile(Q + head * sqh, n, N, sqn, sqd, D, BD)
    Kh = KEYS + head // GROUP * skh
    where = LOG + (head * N + n // LOOKED * LOOKED) * nk + n % LOOKED
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    # Of the tiles that some query sees those from `full` to `cut` are seen whole by all.
    first, end = tl.min(lowest) // BN, tl.max(row) // BN + 1
    full = tl.minimum((tl.max(lowest) + BN - 1) // BN, end)
    cut = tl.maximum((tl.min(row) + 1) // BN, full)
    m, l = _through(
        q, Kh, row, lowest, where, live, first, end - cut + full, full, cut - full, m, l, scale_log2, T, nk, skm, skd,
        LOOKED, D, BD, BN, PARTS, PRECISION, True,
    )  # fmt: skip
    m, l = _through(
        q, Kh, row, lowest, where, live, full, cut, 0, 0, m, l, scale_log2, T, nk, skm, skd,
        LOOKED, D, BD, BN, PARTS, PRECISION, False,
    )  # fmt: skip
    tl.store(LSE + head * N + n, m + tl.log2(l), mask=live)


@triton.jit
def _through(
    q, Kh, row, lowest, where, live, start, stop, leap_at, leap, m, l, scale_log2, T, nk, skm, skd,
    LOOKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(m, l), maxima and sums of rows, after tiles `start` to `stop`; those from `leap_at` on lie `leap` further."""
    for counted in range(start, stop):
        tile = counted
        if MASKED:
            tile += tl.where(counted < leap_at, 0, leap)
        keys = tile * BN + tl.arange(0, BN)
        k = load_tile(Kh, keys, T, skm, skd, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where((keys[None, :] <= row[:, None]) & (keys[None, :] >= lowest[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet has no maximum.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        l = l * tl.exp2(m - base) + tl.sum(p, 1)
        m = m_new
        # A mass too small beside what came before is 0.
        if PARTS == 1:
            tl.store(where + tile * LOOKED, base + tl.log2(tl.sum(p, 1)), mask=live)
        else:
            block = tile * PARTS + tl.arange(0, PARTS)
            masses = tl.sum(tl.reshape(p, (p.shape[0], PARTS, BN // PARTS)), 2)
            there = live[:, None] & (block < nk)[None, :]
            tl.store(where[:, None] + block[None, :] * LOOKED, base[:, None] + tl.log2(masses), mask=there)
    return m, l


@triton.jit
def _mean_masses(
    LOG, LSE, LOWEST, ROWS, MASS, N, nk,
    GROUP: tl.constexpr, LOOKED: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    i, kv = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = i * LOOKED + tl.arange(0, LOOKED)
    # Of other blocks nothing may have been stored.
    seen = (j[:, None] >= (tl.load(LOWEST + n) // BN)[None, :]) & (j[:, None] <= (tl.load(ROWS + n) // BN)[None, :])
    sums = tl.zeros([BLOCKS, LOOKED], tl.float32)
    for g in range(GROUP):
        head = kv * GROUP + g
        lse = tl.load(LSE + head * N + n)
        where = LOG + (head * N + i * LOOKED) * nk + j[:, None] * LOOKED + tl.arange(0, LOOKED)[None, :]
        log = tl.load(where, mask=seen, other=float("-inf"))
        sums += tl.exp2(log - lse[None, :])
    mean = tl.sum(sums, 1) / (GROUP * LOOKED)
    tl.store(MASS + (kv * tl.num_programs(1) + i) * nk + j, mean, mask=j < nk)
