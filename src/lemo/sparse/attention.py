"""Attention of selected query rows over the keys of their documents.

Original positions decide what a query sees, so that causality, sliding windows and document boundaries hold for any
selection of rows, and nothing of size T·T exists (DESIGN 4.3). On a GPU a kernel is told each query's first and last
key, and what many queries see in common can go to cuDNN (`lemo.kernels.prefix`); the torch path builds masks, one chunk
of queries at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lemo.kernels.dispatch import attention_backend, prefix_by_library
from lemo.selection.layout import causal_bounds
from lemo.sparse.dropout import RowDropout, attention_with_dropout
from lemo.sparse.precision import computes_in
from lemo.sparse.view import LayerView
from lemo.types import SequenceLayout, TokenPlan

if TYPE_CHECKING:
    from lemo.kernels.prefix import Rectangle

# Queries of one chunk: few, so that a chunk's keys end soon after its last query and little masked work is done, and
# so few that its mask stays small; many enough to fill a kernel.
_QUERIES_AT_ONCE = 512
_MASK_ELEMENTS = 2**26


def attend_rows(
    view: LayerView,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    queries: TokenPlan,
    keys: TokenPlan | None,
    layout: SequenceLayout,
    dropout: RowDropout | None,
) -> Tensor:
    """Causal attention of N selected rows, [N, H·d].

    Args:
        view: gives scaling, window and dropout.
        q_HNd: queries of the plan's rows.
        k_KMd, v_KMd: keys and values of `keys`' rows, or of all B·T rows where that is None.
        queries, keys: plans.
        layout: documents.
        dropout: where attention dropout takes its masks, or None.
    """
    H, N, _ = q_HNd.shape
    site = dropout.next_site() if dropout is not None and view.attention_dropout > 0 else None
    # As torch's autocast does for its own attention.
    q_HNd, k_KMd, v_KMd = (x.to(computes_in(x.device.type, x.dtype)) for x in (q_HNd, k_KMd, v_KMd))
    whole = view.window is None and _same_rows(queries, keys, layout)
    if N and not whole and attention_backend(q_HNd, k_KMd, v_KMd, site is not None) == "triton":
        bounds = _key_bounds(queries, keys, layout, view.window)
        rectangles: tuple[Rectangle, ...] = ()
        if keys is None and view.window is None and prefix_by_library(q_HNd):
            from lemo.kernels.prefix import cut_rectangles, worthwhile_keys

            least = worthwhile_keys(q_HNd.shape[-1])
            rectangles = cut_rectangles(layout.documents, queries.cu_seqlens, queries.host_rows, H, least_keys=least)
        return _RowAttention.apply(q_HNd, k_KMd, v_KMd, *bounds, view.scaling, rectangles).reshape(N, -1)
    parts = []
    for index, (first, end) in enumerate(layout.documents):
        n0, n1 = queries.cu_seqlens[index : index + 2]
        if n0 == n1:
            continue
        m0, m1 = (first, end) if keys is None else keys.cu_seqlens[index : index + 2]
        parts.append(
            _attend_document(
                view,
                q_HNd[:, n0:n1],
                k_KMd[:, m0:m1],
                v_KMd[:, m0:m1],
                _Positions(queries, slice(n0, n1), first),
                None if keys is None else _Positions(keys, slice(m0, m1), first),
                (first, end),
                layout.shape[1],
                dropout,
                site,
            )
        )
    if len(parts) == 1:  # as its kernel laid it out, which is no copy away from rows
        return parts[0].transpose(0, 1).reshape(N, -1)
    context = torch.cat(parts, dim=1) if parts else q_HNd.new_empty(H, 0, v_KMd.shape[-1])
    return context.transpose(0, 1).reshape(N, -1)


def _same_rows(queries: TokenPlan, keys: TokenPlan | None, layout: SequenceLayout) -> bool:
    """Whether queries and keys are the same rows, so that attention is plainly causal in each document."""
    if keys is not None:
        return keys is queries
    kept = [end - start for start, end in pairwise(queries.cu_seqlens)]
    return all(count in (0, end - first) for count, (first, end) in zip(kept, layout.documents, strict=True))


def _key_bounds(
    queries: TokenPlan, keys: TokenPlan | None, layout: SequenceLayout, window: int | None
) -> tuple[Tensor, Tensor]:
    """First and last key that each query sees, int32 [N] each, as indices into the keys."""
    first, rows = causal_bounds(layout, queries.rows, window)
    if keys is None:
        return first.int(), rows.int()
    return torch.searchsorted(keys.rows, first).int(), (torch.searchsorted(keys.rows, rows, right=True) - 1).int()


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_HNd: Tensor,
        k_KMd: Tensor,
        v_KMd: Tensor,
        lo_N: Tensor,
        hi_N: Tensor,
        scale: float,
        rectangles: tuple[Rectangle, ...],
    ) -> Tensor:
        from lemo.kernels import prefix

        done = prefix.forward(q_HNd, k_KMd, v_KMd, lo_N, hi_N, scale, rectangles)
        ctx.save_for_backward(q_HNd, k_KMd, v_KMd, done.out, done.lse, done.strip_lo, hi_N)
        ctx.scale, ctx.rectangles, ctx.states = scale, rectangles, done.states
        return done.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHd: Tensor) -> tuple[Tensor | None, ...]:
        from lemo.kernels import prefix

        q, k, v, out, lse, strip_lo, hi = ctx.saved_tensors
        done = prefix.Done(out, lse, strip_lo, ctx.states)
        grads = prefix.backward(grad_NHd, q, k, v, done, hi, ctx.scale, ctx.rectangles)
        return *grads, None, None, None, None


@dataclass(frozen=True)
class _Positions:
    """Positions of a plan's rows in one document, ascending, int64; made only if asked for."""

    plan: TokenPlan
    part: slice
    first: int

    @property
    def here(self) -> Tensor:
        """On the device."""
        return self.plan.rows[self.part] - self.first

    @property
    def host(self) -> Tensor:
        """On the CPU."""
        return self.plan.host_rows[self.part] - self.first


def _attend_document(
    view: LayerView,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    query: _Positions,
    key: _Positions | None,
    document: tuple[int, int],
    length: int,
    dropout: RowDropout | None,
    site: int | None,
) -> Tensor:
    """One document's selected queries, [H, N, d]; keys without positions are all of the document's."""
    H, N, _ = q_HNd.shape
    M = k_KMd.shape[1]
    groups = H // k_KMd.shape[0]
    window = view.window
    first, end = document
    if N == M and site is None and (window is None or window >= end - first):
        # Queries and keys are the same rows in the same order: plain causal attention, the backend's fast path.
        # Squeezed: the gradient of an index is a copy among zeros.
        return F.scaled_dot_product_attention(
            q_HNd[None], k_KMd[None], v_KMd[None], is_causal=True, scale=view.scaling, enable_gqa=groups > 1
        ).squeeze(0)
    if groups > 1:  # masked backends don't group heads
        k_KMd, v_KMd = k_KMd.repeat_interleave(groups, 0), v_KMd.repeat_interleave(groups, 0)

    step = max(1, min(N, _QUERIES_AT_ONCE, _MASK_ELEMENTS // M))
    # How many keys the chunk's last query can see.
    last = query.host[[min(end, N) - 1 for end in range(step, N + step, step)]]
    reach = (last + 1 if key is None else torch.searchsorted(key.host, last, right=True)).tolist()
    key_position = torch.arange(M, device=q_HNd.device) if key is None else key.here
    query_position = query.here
    chunks = []
    for start, seen in zip(range(0, N, step), reach, strict=True):
        queries = query_position[start : start + step, None]
        keys = key_position[None, :seen]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        q, k, v = q_HNd[:, start : start + step], k_KMd[:, :seen], v_KMd[:, :seen]
        if site is None or dropout is None:
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask[None, None], scale=view.scaling
            )[0]
        else:
            # The hash's row of head 0: sequence b, query t -> b·H·T + t; keys count within the sequence.
            row = first + queries[:, 0]
            head_rows = (row // length) * H * length + row % length
            out = attention_with_dropout(
                q,
                k,
                v,
                mask,
                view.scaling,
                dropout.seed,
                site,
                head_rows,
                length,
                view.attention_dropout,
                first % length,
            )
        chunks.append(out)
    return torch.cat(chunks, dim=1)
