"""Dropout whose mask is a pure function of (seed, site, row, column), so a recomputed row sees its forward's mask.

`backward` mode recomputes some rows of a layer. torch's own dropout draws from a stream, so a mask can only be had
again for all rows at once; a counter-based hash gives any row's mask by itself, in the forward and in the
recomputation alike, at no storage. Rejected: replaying torch's stream densely (T·T for attention dropout).

`RowDropout` is a TorchFunctionMode: inside it `F.dropout` and the dropout of scaled_dot_product_attention take their
masks from the hash, so LoRA's, OPT's and attention's dropout are all covered without touching a module. A *site* is
the how-manieth dropout of the layer, in the order the modules run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MASK_32 = 0xFFFFFFFF
_ROWS_AT_ONCE_BYTES = 64 * 2**20


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (xor-shift-multiply) on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _MASK_32
    return x ^ (x >> 16)


def dropout_mask(seed: int, site: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Mask of kept elements, bool [len(rows), columns]; each is kept with probability 1 - p.

    Args:
        seed, site: non-negative.
        rows: int64, original row numbers, any order.
        columns: width of a row.
        p: probability of dropping.
    """
    key = _mix(torch.tensor((seed ^ (site * 0x9E3779B1)) & _MASK_32, device=rows.device))
    row_key = _mix(_mix((rows & _MASK_32) ^ key) ^ (rows >> 32))
    column = torch.arange(columns, device=rows.device)
    mask = torch.empty(rows.numel(), columns, dtype=torch.bool, device=rows.device)
    step = max(1, _ROWS_AT_ONCE_BYTES // (8 * 4 * max(columns, 1)))
    threshold = int(p * 2**32)
    for start in range(0, rows.numel(), step):
        part = row_key[start : start + step, None]
        mask[start : start + step] = _mix((part + column * 0x9E3779B1) & _MASK_32) >= threshold
    return mask


class RowDropout(TorchFunctionMode):
    """Within this context dropout masks come from `dropout_mask`.

    Args:
        seed: of the layer call.

    `rows` are the original row numbers of the tensors' leading dimensions; None: they hold every row in order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.site = 0
        self.rows: Tensor | None = None

    @contextmanager
    def on(self, rows: Tensor | None, site: int | None = None) -> Iterator[None]:
        """Tensors inside hold `rows`; `site` rewinds the site counter first."""
        before, self.rows = self.rows, rows
        self.site = self.site if site is None else site
        try:
            yield
        finally:
            self.rows = before

    def next_site(self) -> int:
        self.site += 1
        return self.site - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0.0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        columns = input.shape[-1]
        leading = input.numel() // max(columns, 1)
        rows = self.rows
        if rows is None or input.dim() == 4:  # eager attention weights [B, H, T, T] hold every row
            rows = torch.arange(leading, device=input.device)
        kept = dropout_mask(self.seed, self.next_site(), rows, columns, p).view(input.shape)
        return input * kept / (1.0 - p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The dense forward's attention, [B, H, T, d], in query chunks, never T·T."""
        B, H, T, _ = query.shape
        site = self.next_site()
        groups = H // key.shape[1]
        out = []
        for b in range(B):
            allowed = None if attn_mask is None else attn_mask[min(b, attn_mask.shape[0] - 1), 0]
            row_ids = b * H * T + torch.arange(T, device=query.device)
            chunks = []
            for start in range(0, T, 256):
                part = slice(start, min(start + 256, T))
                bias = None if allowed is None else allowed[part]
                if is_causal:
                    bias = row_ids[part, None] - b * H * T >= torch.arange(key.shape[2], device=query.device)
                chunks.append(
                    attention_with_dropout(
                        query[b][:, part],
                        key[b].repeat_interleave(groups, 0),
                        value[b].repeat_interleave(groups, 0),
                        bias,
                        scale if scale is not None else query.shape[-1] ** -0.5,
                        self.seed,
                        site,
                        row_ids[part],
                        T,
                        dropout_p,
                    )
                )
            out.append(torch.cat(chunks, dim=1))
        return torch.stack(out)


def on_rows(dropout: RowDropout | None, rows: Tensor | None, site: int | None = None) -> AbstractContextManager[None]:
    """`dropout.on(rows, site)`, or nothing where there is no dropout."""
    return nullcontext() if dropout is None else dropout.on(rows, site)


def attention_with_dropout(
    q_HNd: Tensor,
    k_HMd: Tensor,
    v_HMd: Tensor,
    mask_NM: Tensor | None,
    scaling: float,
    seed: int,
    site: int,
    first_head_rows: Tensor,
    rows_per_head: int,
    p: float,
    first_key: int = 0,
) -> Tensor:
    """softmax(q·k)·v with attention dropout by the hash, [H, N, d].

    Args:
        mask_NM: bool (True attends) or additive.
        first_head_rows: int64 [N], the hash's row of head 0 (see `attention_rows`); head h adds h · rows_per_head.
        p: dropout probability.
        first_key: the key index of column 0, so that a slice of the keys sees the same mask.
    """
    H, N, M = q_HNd.shape[0], q_HNd.shape[1], k_HMd.shape[1]
    scores = (q_HNd @ k_HMd.transpose(1, 2)) * scaling
    if mask_NM is not None:
        scores = scores.masked_fill(~mask_NM, float("-inf")) if mask_NM.dtype == torch.bool else scores + mask_NM
    weights = torch.softmax(scores, dim=-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    # A padding row attends nothing, which softmax makes NaN; every other NaN is the caller's to see.
    weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0).to(v_HMd.dtype)
    heads = torch.arange(H, device=q_HNd.device)[:, None] * rows_per_head
    rows = (first_head_rows[None] + heads).flatten()
    kept = dropout_mask(seed, site, rows, first_key + M, p)[:, first_key:].view(H, N, M)
    return (weights * kept / (1.0 - p)) @ v_HMd
