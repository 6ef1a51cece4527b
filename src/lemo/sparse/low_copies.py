"""LoRA matrices in the dtype of products, made for a whole forward pass of the model at once.

Cast by each linear they are seven launches a layer, of which a short sequence feels every one. Copies are of one pass:
nobody finds them after it, so they can't be older than the parameters.

Shapes: as in `lemo.sparse.low_rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

# Those of linears that share an input: each one's A and B.
Group = tuple[Sequence[Tensor], Sequence[Tensor]]
_copies: ContextVar[dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] | None] = ContextVar("copies", default=None)


@contextmanager
def copied(groups: Sequence[Group], dtype: torch.dtype) -> Iterator[None]:
    """Inside, `in_dtype` of these groups makes nothing.

    Args:
        groups: all on one device, contiguous.
        dtype: of products.
    """
    matrices = [x for a, b in groups for x in (*a, *b)]
    if not matrices:
        yield
        return
    sizes = [x.numel() for x in matrices]
    store = torch.empty(sum(sizes), dtype=dtype, device=matrices[0].device)
    with torch.no_grad():
        low = list(_unflatten_dense_tensors(store, matrices))
        torch._foreach_copy_(low, matrices)
    found: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}
    first = start = 0
    for a, b in groups:
        last, end = first + len(a), start + sum(sizes[first : first + len(a)])
        stacked = low[first] if len(a) == 1 else store[start:end].view(-1, a[0].shape[1])
        found[_key(a, b)] = stacked, low[last : last + len(b)]
        first, start = last + len(b), end + sum(sizes[last : last + len(b)])
    token = _copies.set(found)
    try:
        yield
    finally:
        _copies.reset(token)


def in_dtype(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A one above the other, [R, I], and each B, in that dtype."""
    copies = _copies.get()
    found = None if copies is None else copies.get(_key(a, b))
    if found is not None and found[0].dtype == dtype:
        return found
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype), [b_Or.to(dtype) for b_Or in b]


def _key(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, ...]:
    return (*map(id, a), *map(id, b))
