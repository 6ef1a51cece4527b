"""Cheap tensors that a backward computes again in place of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(tensor: Tensor, again: Callable[[], Tensor] | None) -> Iterator[None]:
    """Inside, whatever saves `tensor` for its backward gets it from `again` then; nothing happens if that is None.

    Not inside a checkpoint, which drops saved tensors itself: it would not see this one, and `again` holds others.
    Hooks on saved tensors that were set further out don't see what is saved inside.

    Args:
        tensor: found again by its memory, so a view of other shape is saved as it is.
        again: computes the same numbers without a graph; what it holds is stored.
    """
    if again is None or not torch.is_grad_enabled():
        yield
        return
    promise = _Promise(again)
    memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    def pack(x: Tensor) -> Any:
        if x.data_ptr() == memory[0] and (x.data_ptr(), x.shape, x.stride(), x.dtype) == memory:
            return promise.given()
        # Not x itself where it has a graph: an output that its own function saves would hold itself.
        return x.detach() if x.requires_grad else x

    def unpack(x: Any) -> Tensor:
        return x.kept() if isinstance(x, _Promise) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Promise:
    """Computes once for all that wait, as long as some do."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self._again = again
        self._waiting = 0
        self._value: Tensor | None = None

    def given(self) -> _Promise:
        self._waiting += 1
        return self

    def kept(self) -> Tensor:
        value = self._again() if self._value is None else self._value
        self._waiting -= 1
        self._value = value if self._waiting > 0 else None
        return value
