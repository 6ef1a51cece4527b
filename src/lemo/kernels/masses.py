"""How much some queries' scores say of each key block: the logarithm of the sum of their exponentials, in Triton.

A program takes a tile of queries of one head and goes through the keys once. Block after block it stores one number a
query, never the scores.

N queries, T keys of one document, H query heads, K key heads (H a multiple of K), d head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.tiles import LOG2_E, load_tile, power_of_2, tiles_of

QUERIES = 64


def block_log_masses(q_HNd: Tensor, k_KTd: Tensor, rows_N: Tensor, scale: float, key_block: int) -> Tensor:
    """Logarithms to base 2 of each key block's softmax mass but for the row's denominator, fp32 [H, blocks, N]; -inf
    where a query sees nothing of a block.

    Args:
        q_HNd, k_KTd: positioned queries and keys of one dtype, any strides; d at most 512 bytes.
        rows_N: which row of the document each query is, int64.
        scale: factor on q·k.
        key_block: a power of two from 16 to 128.
    """
    H, N, d = q_HNd.shape
    K, T, _ = k_KTd.shape
    found = torch.full((H, tiles_of(T, key_block), N), float("-inf"), device=q_HNd.device, dtype=torch.float32)
    if N:
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            _log_masses[(tiles_of(N, QUERIES), H)](
                q_HNd, k_KTd, rows_N, found, scale * LOG2_E, N, T,
                *q_HNd.stride(), *k_KTd.stride(), *found.stride()[:2],
                GROUP=H // K, D=d, BD=max(16, power_of_2(d)), BM=QUERIES, BN=key_block,
                PRECISION="ieee" if q_HNd.dtype == torch.float32 else "tf32",
                num_warps=4, num_stages=2,
            )  # fmt: skip
    return found


@triton.jit
def _log_masses(
    Q, KEYS, ROWS, OUT, scale_log2, N, T,
    sqh, sqn, sqd, skh, skm, skd, soh, soj,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    row = tl.load(ROWS + n, mask=n < N, other=-1).to(tl.int32)
    q = load_tile(Q + head * sqh, n, N, sqn, sqd, D, BD)
    Kh = KEYS + head // GROUP * skh
    for block in range(tl.max(row) // BN + 1):
        keys = block * BN + tl.arange(0, BN)
        k = load_tile(Kh, keys, T, skm, skd, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(keys[None, :] <= row[:, None], s, float("-inf"))
        most = tl.max(s, 1)
        base = tl.where(most == float("-inf"), 0.0, most)
        mass = base + tl.log2(tl.sum(tl.exp2(s - base[:, None]), 1))
        tl.store(OUT + head * soh + tl.cast(block, tl.int64) * soj + n, mass, mask=n < N)
