"""How much of its attention a query block of one document gives to each key block: estimates to choose blocks by.

H query heads, K key heads, T tokens of the document, d head size; n query blocks, nk key blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lemo.config import QUERY_BLOCKS
from lemo.kernels import reference
from lemo.kernels.dispatch import block_sparse_backend


def looked_at(look: float, query_block: int) -> int:
    """How many queries of a block a share of them is: a power of two that divides the block, at most 64."""
    nearest = 2 ** max(0, round(math.log2(look * query_block)))
    return math.gcd(min(64, nearest), query_block)


def scores_of_looked(q_HTd: Tensor, k_KTd: Tensor, key_block: int, looked: int) -> int:
    """How many numbers `looked_mass` holds at a time for each pair of a query block and a key block."""
    by_kernel = block_sparse_backend(q_HTd, k_KTd, k_KTd, key_block) == "triton"
    return q_HTd.shape[0] * looked * (1 if by_kernel else key_block)


def pool(x_HTd: Tensor, size: int) -> Tensor:
    """Means over blocks of one document, fp32 or wider, [H, blocks, d]; the last block may be short."""
    wide = torch.promote_types(x_HTd.dtype, torch.float32)
    whole = x_HTd.shape[1] // size * size
    mean = x_HTd[:, :whole].unflatten(1, (-1, size)).mean(2, dtype=wide) if whole else None
    if whole == x_HTd.shape[1]:
        assert mean is not None, "a document has tokens"
        return mean
    rest = x_HTd[:, whole:].mean(1, keepdim=True, dtype=wide)
    return rest if mean is None else torch.cat([mean, rest], 1)


def pooled_mass(q_Hqd: Tensor, k_Kkd: Tensor, block: Tensor, lowest: Tensor, scale: float) -> Tensor:
    """By means of the blocks' queries and keys; mean over the heads of a group, [K, n, nk].

    Args:
        q_Hqd, k_Kkd: means of all query and key blocks.
        block: which query blocks, int64 [n].
        lowest: the first key block that each sees, int64 [n].
        scale: factor on q·k.
    """
    keys = torch.arange(k_Kkd.shape[1], device=q_Hqd.device)
    unseen = (keys < lowest[:, None]) | (keys >= (block[:, None] + 1) * QUERY_BLOCKS)
    logits = q_Hqd[:, block].unflatten(0, (k_Kkd.shape[0], -1)) @ k_Kkd[:, None].transpose(-1, -2) * scale
    return logits.masked_fill_(unseen, float("-inf")).softmax(-1).mean(1)


def looked_mass(
    q_HTd: Tensor,
    k_KTd: Tensor,
    block: Tensor,
    lowest: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    looked: int,
) -> Tensor:
    """By all keys and a few queries of each block; mean over these and the heads of a group, [K, n, nk].

    Args:
        q_HTd, k_KTd: the document's queries and keys.
        block: which query blocks, int64 [n].
        lowest: the first key block that each sees, int64 [n].
        scale: factor on q·k.
        query_block, key_block: tokens of a block.
        looked: queries of a block that are looked at.
    """
    step = query_block // looked
    inside = step // 2 + step * torch.arange(looked, device=q_HTd.device)
    # The last query block may be short.
    rows = (block[:, None] * query_block + inside).clamp(max=q_HTd.shape[1] - 1).flatten()
    first = (lowest * key_block).repeat_interleave(looked, output_size=len(rows))
    q_HNd = q_HTd[:, rows]
    if block_sparse_backend(q_HNd, k_KTd, k_KTd, key_block) == "triton":
        from lemo.kernels.masses import block_masses

        return block_masses(q_HNd, k_KTd, first, rows, scale, key_block, looked)
    return reference.block_masses(q_HNd, k_KTd, first, rows, scale, key_block, looked)
