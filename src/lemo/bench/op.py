"""One operation by one implementation, as `lemo bench ops` measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """What is called, and what it must at least do.

    Attributes:
        op, implementation: names.
        shape: in words.
        T: tokens.
        keep: share of the rows that are moved, None where all are.
        prepare: allocates; gives the call.
        bytes: read and written at least, 0 where operations are what counts.
        flop: operations of its matrix products.
        handed_out: bytes of what every implementation must return, which its peak counts without.
        method: the training method it belongs to.
    """

    op: str
    implementation: str
    shape: str
    T: int
    keep: float | None
    prepare: Callable[[], Callable[[], object]]
    bytes: float = 0.0
    flop: float = 0.0
    handed_out: int = 0
    method: str = "lemo-forward"
