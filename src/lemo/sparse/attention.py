"""Attention of selected query rows over the keys of their documents (the torch path).

Masks are built from original positions, one chunk of queries at a time, so that causality, sliding windows and
document boundaries hold for any selection of rows and nothing of size T·T exists (DESIGN 4.3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.sparse.dropout import RowDropout, attention_with_dropout
from lemo.sparse.view import LayerView
from lemo.types import SequenceLayout

# Queries of one chunk: few, so that a chunk's keys end soon after its last query and little masked work is done, and
# so few that its mask stays small; many enough to fill a kernel.
_QUERIES_AT_ONCE = 512
_MASK_ELEMENTS = 2**26


def attend_rows(
    view: LayerView,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    query_rows: Tensor,
    query_cu: tuple[int, ...],
    key_rows: Tensor | None,
    key_cu: tuple[int, ...] | None,
    layout: SequenceLayout,
    dropout: RowDropout | None,
) -> Tensor:
    """Causal attention of N selected rows, [N, H·d].

    Args:
        view: gives scaling, window and dropout.
        q_HNd: queries of `query_rows`.
        k_KMd, v_KMd: keys and values of `key_rows`, or of all B·T rows where that is None.
        query_rows: int64 [N], sorted.
        query_cu: queries of each document, cumulated (`TokenPlan.cu_seqlens`).
        key_rows, key_cu: the same for the keys.
        layout: documents.
        dropout: where attention dropout takes its masks, or None.
    """
    H, N, _ = q_HNd.shape
    site = dropout.next_site() if dropout is not None and view.attention_dropout > 0 else None
    parts = []
    for index, (first, end) in enumerate(layout.documents):
        n0, n1 = query_cu[index], query_cu[index + 1]
        if n0 == n1:
            continue
        if key_rows is None or key_cu is None:
            m0, m1 = first, end
            key_position = torch.arange(end - first, device=q_HNd.device)
        else:
            m0, m1 = key_cu[index], key_cu[index + 1]
            key_position = key_rows[m0:m1] - first
        same_rows = n1 - n0 == m1 - m0
        parts.append(
            _attend_document(
                view,
                q_HNd[:, n0:n1],
                k_KMd[:, m0:m1],
                v_KMd[:, m0:m1],
                query_rows[n0:n1] - first,
                key_position,
                first,
                layout.shape[1],
                same_rows,
                dropout,
                site,
            )
        )
    context = torch.cat(parts, dim=1) if parts else q_HNd.new_empty(H, 0, v_KMd.shape[-1])
    return context.transpose(0, 1).reshape(N, -1)


def _attend_document(
    view: LayerView,
    q_HNd: Tensor,
    k_KMd: Tensor,
    v_KMd: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    first_row: int,
    length: int,
    same_rows: bool,
    dropout: RowDropout | None,
    site: int | None,
) -> Tensor:
    """One document's selected queries, [H, N, d]; positions count from the document's first token."""
    H, N, _ = q_HNd.shape
    groups = H // k_KMd.shape[0]
    window = view.window
    if same_rows and site is None and (window is None or window >= int(key_position[-1]) + 1):
        # Queries and keys are the same rows in the same order: plain causal attention, the backend's fast path.
        return F.scaled_dot_product_attention(
            q_HNd[None], k_KMd[None], v_KMd[None], is_causal=True, scale=view.scaling, enable_gqa=groups > 1
        )[0]
    if groups > 1:  # masked backends don't group heads
        k_KMd, v_KMd = k_KMd.repeat_interleave(groups, 0), v_KMd.repeat_interleave(groups, 0)

    M = k_KMd.shape[1]
    step = max(1, min(N, _QUERIES_AT_ONCE, _MASK_ELEMENTS // M))
    # How many keys the chunk's last query can see: one transfer for all chunks.
    last = torch.arange(min(step, N), N + step, step, device=q_HNd.device).clamp(max=N) - 1
    reach = torch.searchsorted(key_position, query_position[last], right=True).tolist()
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
            row = first_row + queries[:, 0]
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
                first_row % length,
            )
        chunks.append(out)
    return torch.cat(chunks, dim=1)
