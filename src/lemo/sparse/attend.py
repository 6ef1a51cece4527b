"""Attention in which each query sees the key blocks of its list (the `attend` axis), for all rows or for kept ones.

On a GPU the block-sparse kernels; elsewhere plain torch, some queries at a time, with masks (slow: the work is that of
dense attention). Both give a query of padding zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lemo.kernels import reference
from lemo.kernels.block_lists import BlockLists
from lemo.kernels.dispatch import block_sparse_backend

if TYPE_CHECKING:
    from lemo.kernels.block_sparse import Queries

_SCORES_AT_ONCE = 2**24


def attend_lists(
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    lists: BlockLists,
    host_rows: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of N queries, [N, H, d]; differentiable.

    Args:
        q_HNd: queries of `host_rows`, in the keys' and values' dtype.
        k_KMd, v_KMd: keys and values of all rows of the lists' grid.
        lists: what each query block sees.
        host_rows: int64 [N], ascending, on the CPU; None for all rows.
        scale: factor on q·k.
    """
    if block_sparse_backend(q_HNd, k_KMd, v_KMd, lists.grid.key_block) == "triton":
        from lemo.kernels.block_sparse import Queries

        return _ListAttention.apply(q_HNd, k_KMd, v_KMd, Queries(lists, host_rows), scale)
    return _PlainListAttention.apply(q_HNd, k_KMd, v_KMd, lists, host_rows, scale)


class _ListAttention(torch.autograd.Function):
    """By the kernels."""

    @staticmethod
    def forward(ctx: Any, q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, queries: Queries, scale: float) -> Tensor:
        from lemo.kernels.block_sparse import block_sparse_forward

        out, lse = block_sparse_forward(q_HNd, k_KMd, v_KMd, queries, scale)
        ctx.save_for_backward(q_HNd, k_KMd, v_KMd, out, lse)
        ctx.queries, ctx.scale = queries, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHd: Tensor) -> tuple[Tensor | None, ...]:
        from lemo.kernels.block_sparse import block_sparse_backward

        q, k, v, out, lse = ctx.saved_tensors
        grads = block_sparse_backward(grad_NHd, q, k, v, out, lse, ctx.queries, ctx.scale)
        ctx.queries.lists.forget()
        return *grads, None, None


class _PlainListAttention(torch.autograd.Function):
    """By torch: the masks exist for a chunk of queries at a time, in the backward too."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HNd: Tensor,
        k_KMd: Tensor,
        v_KMd: Tensor,
        lists: BlockLists,
        host_rows: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_HNd, k_KMd, v_KMd)
        ctx.chunks, ctx.scale = list(_chunks(lists, host_rows, q_HNd.shape[0])), scale
        out_NHd = q_HNd.new_zeros(q_HNd.shape[1], q_HNd.shape[0], v_KMd.shape[2])
        for chunk in ctx.chunks:
            k, v = k_KMd[:, chunk.keys], v_KMd[:, chunk.keys]
            out_NHd[chunk.queries] = _attend_chunk(q_HNd[:, chunk.queries], k, v, chunk, scale)
        return out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHd: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
        for chunk in ctx.chunks:
            parts = (chunk.queries, chunk.keys, chunk.keys)
            leaves = [x[:, part].detach().requires_grad_() for x, part in zip(inputs, parts, strict=True)]
            with torch.enable_grad():
                out = _attend_chunk(leaves[0], leaves[1], leaves[2], chunk, ctx.scale)
            found = torch.autograd.grad(out, leaves, grad_NHd[chunk.queries])
            for total, part, grad in zip(sums, parts, found, strict=True):
                total[:, part] += grad
        return *(total.to(x.dtype) for total, x in zip(sums, inputs, strict=True)), None, None, None


@dataclass(frozen=True)
class _Chunk:
    """Queries of one document, and the keys that any of them may see."""

    lists: BlockLists
    rows: Tensor
    queries: slice
    keys: slice


def _chunks(lists: BlockLists, host_rows: Tensor | None, heads: int) -> Iterator[_Chunk]:
    rows = torch.arange(lists.grid.rows) if host_rows is None else host_rows
    for first, end in lists.grid.documents:
        begin, stop = torch.searchsorted(rows, torch.tensor([first, end])).tolist()
        step = max(1, _SCORES_AT_ONCE // (heads * (end - first)))
        for n in range(begin, stop, step):
            queries = slice(n, min(n + step, stop))
            yield _Chunk(lists, rows[queries], queries, slice(first, int(rows[queries.stop - 1]) + 1))


def _attend_chunk(q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    """The chunk's output, [n, H, d]."""
    bias = chunk.lists.bias(chunk.rows.to(q_HNd.device), chunk.keys.start, chunk.keys.stop)
    return reference.block_sparse_attention(q_HNd, k_KMd, v_KMd, bias, scale)
