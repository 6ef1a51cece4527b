"""How much of its attention a query block of one document gives to each key block: estimates to choose blocks by.

H query heads, K key heads, T tokens of the document, d head size; n query blocks, nk key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.kernels import reference
from lemo.kernels.dispatch import block_sparse_backend

# Queries of each block that are looked at: an eighth of a block's 128.
LOOKED_AT = 16


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


def pooled_mass(q_Hqd: Tensor, k_Kkd: Tensor, unseen: Tensor, block: Tensor, scale: float) -> Tensor:
    """By means of the blocks' queries and keys; mean over the heads of a group, [K, n, nk].

    Args:
        q_Hqd, k_Kkd: means of all query and key blocks.
        unseen: key blocks that a query block doesn't see, bool [n, nk].
        block: which query blocks, int64 [n].
        scale: factor on q·k.
    """
    logits = q_Hqd[:, block].unflatten(0, (k_Kkd.shape[0], -1)) @ k_Kkd[:, None].transpose(-1, -2) * scale
    return logits.masked_fill_(unseen, float("-inf")).softmax(-1).mean(1)


def looked_mass(
    q_HTd: Tensor, k_KTd: Tensor, unseen: Tensor, block: Tensor, scale: float, query_block: int, key_block: int
) -> Tensor:
    """By all keys and a few queries of each block; mean over these and the heads of a group, [K, n, nk].

    Args:
        q_HTd, k_KTd: the document's queries and keys.
        unseen, block, scale: as for `pooled_mass`.
        query_block, key_block: tokens of a block.
    """
    count = min(LOOKED_AT, query_block)
    step = query_block // count
    inside = step // 2 + step * torch.arange(count, device=q_HTd.device)
    # The last query block may be short.
    rows = (block[:, None] * query_block + inside).clamp(max=q_HTd.shape[1] - 1).flatten()
    q_HNd = q_HTd[:, rows]
    if block_sparse_backend(q_HNd, k_KTd, k_KTd, key_block) == "triton":
        from lemo.kernels.masses import block_log_masses

        found = block_log_masses(q_HNd, k_KTd, rows, scale, key_block)
    else:
        found = reference.block_log_masses(q_HNd, k_KTd, rows, scale, key_block)
    found = found.unflatten(-1, (-1, count)).masked_fill_(unseen.T[:, :, None], float("-inf"))
    found = found.sub_(found.amax(1, keepdim=True)).exp2_()
    found /= found.sum(1, keepdim=True)
    return found.unflatten(0, (k_KTd.shape[0], -1)).mean((1, 4)).transpose(1, 2)
