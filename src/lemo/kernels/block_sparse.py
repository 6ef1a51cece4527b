"""Attention in which each block of queries sees the key blocks of its list, forward and backward, in Triton.

A program takes a tile of queries of one block (`lemo.kernels.block_lists`) and goes through the block's chosen key
blocks, the run before it, and itself; only keys inside the query block need a mask (where a sliding window cuts, all
do). Gradients of keys and values: a program takes the keys of a block and goes through the queries of its range, which
follow each other, and the listed tiles of queries that see it beside these. Sums have one order, so results repeat bit
by bit.

N queries, M keys, H query heads, K key/value heads, G = H/K, d head size. FlashAttention-2's algorithm, as in
`lemo.kernels.attention`; logarithms of softmax denominators are to base 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lemo.kernels.block_grid import RowTiles
from lemo.kernels.block_lists import BlockLists
from lemo.kernels.block_sparse_kernels import backward_keys, backward_queries, forward
from lemo.kernels.launches import Launch, Launches, launches_for
from lemo.kernels.tiles import LOG2_E, power_of_2, tiles_of


@dataclass(frozen=True, eq=False)
class Queries:
    """Which queries attend.

    Attributes:
        lists: what they see.
        host_rows: their rows, int64 [N], ascending, on the CPU; None for all M rows.
    """

    lists: BlockLists
    host_rows: Tensor | None

    def shape(self, group: int, launch: Launch) -> tuple[int, int]:
        """(lanes, heads) of a tile: one head where a block's rows fill it, else a group's if it has so many lanes."""
        grid, lanes = self.lists.grid, launch.lanes
        if self.host_rows is None and grid.longest >= lanes:
            return lanes, 1
        if self.host_rows is not None and len(self.host_rows) * group <= len(grid.query_first) * lanes // 2:
            # A block has few queries left.
            lanes = max(16, lanes // 2)
        return lanes, group if group <= lanes else 1


def block_sparse_forward(
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    queries: Queries,
    scale: float,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its block's list up to itself.

    Args:
        q_HNd, k_KMd, v_KMd: one dtype, any strides; d at most 256.
        queries: their rows and lists; key blocks of 16 to 128 tokens, a power of two.
        scale: factor on q·k.
        launches: how the kernels run; None for `launches_for`'s.

    Returns:
        Output [N, H, d], contiguous, in the inputs' dtype, 0 for queries of padding; logarithm (base 2) of each
        softmax's denominator, fp32 [H, N].
    """
    H, N, d = q_HNd.shape
    K = k_KMd.shape[0]
    new = torch.zeros if queries.lists.grid.padded else torch.empty
    out = new(N, H, d, device=q_HNd.device, dtype=q_HNd.dtype)
    lse = new(H, N, device=q_HNd.device, dtype=torch.float32)
    launch = (launches or _launches(q_HNd, queries.lists)).forward
    constants, tiles = _constants_and_tiles(q_HNd, K, queries, launch)
    copied = _descriptors(launch, (constants["BN"], constants["BD"]), k_KMd, v_KMd)
    if len(tiles.block):
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(q_HNd):
            forward[(len(tiles.block) * (H // K // constants["HEADS"]), K)](
                q_HNd, k_KMd, v_KMd, *(copied or (k_KMd, v_KMd)), out, lse,
                *_of_tiles(tiles), *_of_lists(queries.lists),
                scale * LOG2_E, N,
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), out.stride(1), out.stride(0),
                **constants, TMA=copied is not None,
            )  # fmt: skip
    return out, lse


def block_sparse_backward(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    out_NHd: Tensor,
    lse_HN: Tensor,
    queries: Queries,
    scale: float,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [H, N, d], keys and values [K, M, d], in their dtypes; keys that nobody sees get zeros."""
    lists = queries.lists
    launches = launches or _launches(q_HNd, lists)
    grad_NHd = grad_NHd.contiguous()
    dq, pairs = query_gradient(grad_NHd, q_HNd, k_KMd, v_KMd, out_NHd, lse_HN, queries, scale, launches.queries)
    dk, dv = key_gradients(grad_NHd, q_HNd, k_KMd, v_KMd, pairs, queries, scale, launches.keys)
    return dq, dk, dv


def query_gradient(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    out_NHd: Tensor,
    lse_HN: Tensor,
    queries: Queries,
    scale: float,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """Gradient of queries [H, N, d]; of each row `lse_HN` and the product of output and gradient, fp32 [H, N, 2].

    `grad_NHd` and `out_NHd` are contiguous.
    """
    H, N, _ = q_HNd.shape
    K = k_KMd.shape[0]
    new = torch.zeros if queries.lists.grid.padded else torch.empty
    pairs = new(H, N, 2, device=q_HNd.device, dtype=torch.float32)
    dq = new(q_HNd.shape, device=q_HNd.device, dtype=q_HNd.dtype)
    constants, tiles = _constants_and_tiles(q_HNd, K, queries, launch)
    copied = _descriptors(launch, (constants["BN"], constants["BD"]), k_KMd, v_KMd)
    if len(tiles.block):
        with torch.cuda.device_of(q_HNd):
            backward_queries[(len(tiles.block) * (H // K // constants["HEADS"]), K)](
                q_HNd, k_KMd, v_KMd, *(copied or (k_KMd, v_KMd)), out_NHd, grad_NHd, lse_HN, pairs, dq,
                *_of_tiles(tiles), *_of_lists(queries.lists),
                scale * LOG2_E, scale, N,
                *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0), *dq.stride(),
                **constants, TMA=copied is not None,
            )  # fmt: skip
    return dq, pairs


def key_gradients(
    grad_NHd: Tensor,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    pairs_HN2: Tensor,
    queries: Queries,
    scale: float,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, [K, M, d] each; `pairs_HN2` are `query_gradient`'s."""
    K, N = k_KMd.shape[0], q_HNd.shape[1]
    lists, grid, blocks = queries.lists, queries.lists.grid, len(queries.lists.grid.key_first)
    constants, tiles = _constants_and_tiles(q_HNd, K, queries, launch)
    if queries.host_rows is None:
        # Every listed query block stands for as many tiles as the longest has.
        seen_by, first, end = lists.turned, grid.here.query_first, grid.here.query_end
        rows = constants["BM"] // constants["HEADS"]
        chunks, full = tiles_of(grid.longest, rows), rows * constants["HEADS"] == constants["BM"]
        full = full and grid.longest % rows == 0 and not constants["CUT"]
    else:
        seen_by, first, end, chunks, full = lists.spread(tiles), tiles.first, tiles.end, 1, False
    copied = _descriptors(launch, (constants["BM"], constants["BD"]), q_HNd, grad_NHd.transpose(0, 1))
    new = torch.zeros if grid.padded else torch.empty
    dk, dv = (new(x.shape, device=x.device, dtype=x.dtype) for x in (k_KMd, v_KMd))
    with torch.cuda.device_of(q_HNd):
        backward_keys[(K * blocks * constants["PARTS"],)](
            q_HNd, k_KMd, v_KMd, grad_NHd, *(copied or (q_HNd, grad_NHd)), pairs_HN2.view(torch.int64), dk, dv,
            *_rows_of(tiles),
            tiles.range_first, tiles.range_full, tiles.range_end, first, end,
            seen_by.seers, _or(seen_by.boost, seen_by.seers), seen_by.start, _head_stride(seen_by.start),
            seen_by.order, grid.here.key_first, grid.here.key_end,
            scale * LOG2_E, scale, N, blocks, K * blocks // len(seen_by.order),
            *q_HNd.stride(), *k_KMd.stride(), *v_KMd.stride(), grad_NHd.stride(1), grad_NHd.stride(0), *dk.stride(),
            **constants,
            CHUNKS=chunks, FULL=full, TMA=copied is not None,
        )  # fmt: skip
    return dk, dv


def _launches(q_HNd: Tensor, lists: BlockLists) -> Launches:
    return launches_for(q_HNd.shape[-1] * q_HNd.element_size(), lists.grid.key_block, q_HNd.device)


def _constants_and_tiles(q_HNd: Tensor, K: int, queries: Queries, launch: Launch) -> tuple[dict[str, Any], RowTiles]:
    """A kernel's constants, and the tiles that these make of the queries."""
    H, d, grid = q_HNd.shape[0], q_HNd.shape[-1], queries.lists.grid
    (lanes, heads), keys = queries.shape(H // K, launch), min(launch.keys, grid.key_block)
    constants = {
        "GROUP": H // K,
        "HEADS": heads,
        "D": d,
        "BD": max(16, power_of_2(d)),
        "BM": lanes,
        "BN": keys,
        "PARTS": grid.key_block // keys,
        "CUT": grid.lowest is not None,
        "WEIGHTED": queries.lists.boost is not None,
        # Tensor cores round fp32 to 10 bits of mantissa; fp32 is for those who want it exact.
        "PRECISION": "ieee" if q_HNd.dtype == torch.float32 else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    return constants, grid.tiles(queries.host_rows, lanes // heads)


def _descriptors(launch: Launch, block: tuple[int, int], *tensors: Tensor) -> tuple[TensorDescriptor, ...] | None:
    """By which the hardware copies whole tiles, [1, *block], of tensors [heads, rows, d]; None where `launch` asks for
    no such copies, or memory doesn't lie as they want it."""
    if not (launch.tma and all(map(_lies_well, tensors))):
        return None
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), [1, *block]) for x in tensors)


def _lies_well(x: Tensor) -> bool:
    sixteen = 16 // x.element_size()
    strides_fit = x.stride(-1) == 1 and all(s > 0 and s % sixteen == 0 for s in x.stride()[:-1])
    return strides_fit and x.data_ptr() % 16 == 0 and x.numel() > 0


def _rows_of(tiles: RowTiles) -> tuple[Tensor, Tensor]:
    return tiles.position, tiles.position if tiles.lowest is None else tiles.lowest


def _of_tiles(tiles: RowTiles) -> tuple[Tensor, ...]:
    return *_rows_of(tiles), tiles.block, tiles.first, tiles.end


def _of_lists(lists: BlockLists) -> tuple[Tensor | int, ...]:
    here = lists.grid.here
    start, entries = here.start, lists.entries
    where = start, _head_stride(start), here.chosen, here.run, here.query_first, here.query_end
    return entries, _or(lists.boost, entries), *where


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """A kernel needs some tensor even where it reads none."""
    return other if given is None else given


def _head_stride(table: Tensor) -> int:
    """From one key head's line to the next; 0 where heads share one."""
    return table.stride(0) if table.shape[0] > 1 else 0
