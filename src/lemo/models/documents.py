"""The dense forward of packed or padded sequences without a mask of T×T.

transformers tells its attention about documents and padding by a mask, 4 GiB at 64K tokens, with which no fast kernel
works. But a row sees consecutive keys, so its first and last key say the same, and our kernel takes these. While a
sparsified decoder runs such a batch, its attention implementation is one registered here; everything else is the
unmodified model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo.kernels.dispatch import attention_backend
from lemo.models.view import ArchitectureView
from lemo.sparse.precision import computes_in
from lemo.types import SequenceLayout

BOUNDS = "lemo_bounds"
_NAME = "lemo_documents"
# With shorter sequences transformers' masks cost little, and hidden states are bitwise the unmodified model's.
_LONG = 2048


def needs_no_mask(layout: SequenceLayout, view: ArchitectureView, implementation: str, dtype: torch.dtype) -> bool:
    """Whether the kernel can stand in for a mask here.

    Args:
        layout: the batch's.
        view: of any layer.
        implementation: the model's attention; only sdpa is replaced.
        dtype: that attention computes in.
    """
    B, T = layout.shape
    whole = len(layout.documents) == B and all(end - first == T for first, end in layout.documents)
    if whole or T < _LONG or implementation != "sdpa":
        return False
    probe = torch.empty(0, view.head_size, dtype=dtype, device=layout.block_of_row.device)
    return attention_backend(probe, probe, probe, view.attention_dropout > 0) == "triton"


def documents_by_bounds(config: Any) -> AbstractContextManager[None]:
    """Inside, a model with this configuration builds no mask, and its attention needs the keyword `BOUNDS`."""
    return stands_in(config, _NAME, _attend)


@contextmanager
def stands_in(config: Any, name: str, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, a model with this configuration builds no mask, and `attention` stands in for its attention function."""
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _no_mask)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: query [B, H, T, d], key and value [B, K, T, d] to [B, T, H, d]."""
    from lemo.kernels.attention import attention_forward

    assert not torch.is_grad_enabled(), "the sparse layer recomputes what needs gradients"
    B, H, T, d = query.shape
    dtype = computes_in(query.device.type, query.dtype)
    q, k, v = (x.transpose(0, 1).reshape(x.shape[1], B * T, d).to(dtype) for x in (query, key, value))
    lo, hi = kwargs[BOUNDS]
    out_NHd, _ = attention_forward(q, k, v, lo, hi, d**-0.5 if scaling is None else scaling)
    return out_NHd.view(B, T, H, d), None
