"""What the branches would have passed back at the rows left out, estimated from the kept rows (docs/decisions/0007).

Let g be the gradient at a branch's output and J its Jacobian. A row r that is left out would pass J_r g_r back to the
branch's input, and g_r's part to the weights. Split J_r = a + (J_r - a) with a number a: the first part costs nothing
and goes to row r itself, the second is estimated as if (J_r - a) were, on the average over a document's rows left out,
what it is on the average over its kept rows:

    sum over r left out of (J_r - a) g_r  ~  sum over the n kept rows k of (J_k - a) s,   s = (sum of g_r) / n

So s enters the branch together with g_k, which gives the weights their part too, and a s is taken back from row k. a is
the least-squares fit of what came back at the kept rows to what entered there. In SmolLM2 it is -0.2 on the average: an
MLP takes away a part of what is in the stream. Without it, a gradient that skips the branches layer after layer grows.

The document's first row takes no share: as attention's sink it is unlike any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lemo.types import SequenceLayout, TokenPlan


@dataclass(frozen=True)
class _Document:
    """One document of which some rows are left out. K kept rows in the batch, D hidden size.

    Attributes:
        rows: its rows.
        kept: its part of the K.
        takers: the part of the K that stands in.
        left_out: 0/1 [rows], in the gradient's dtype.
        share: s, [D]; None without takers.
    """

    rows: slice
    kept: slice
    takers: slice
    left_out: Tensor
    share: Tensor | None


class Compensation:
    """The compensation of one branch, or of a layer's two together.

    Args:
        grad_ND: gradient at the branch's output, N rows.
        plan: the kept rows.
        layout: documents of the batch.
        on: if not, what is left out passes nothing.

    Attributes:
        entering: gradient that enters the branch at the kept rows, [K, D].
    """

    def __init__(self, grad_ND: Tensor, plan: TokenPlan, layout: SequenceLayout, on: bool) -> None:
        self.entering = grad_ND[plan.rows]
        self._grad, self._rows = grad_ND, plan.rows
        self._documents: list[_Document] = []
        if not on:
            return
        for (start, end), (first, last) in zip(layout.documents, pairwise(plan.cu_seqlens), strict=True):
            if not 0 < last - first < end - start:
                continue
            left_out = grad_ND.new_ones(end - start)
            # `left_out[...] = 0` would copy the 0 to the device and wait for it.
            left_out.index_fill_(0, plan.rows[first:last] - start, 0.0)
            takers = slice(first + int(plan.host_rows[first] == start), last)
            share = None
            if takers.start < last:
                with torch.autocast(grad_ND.device.type, enabled=False):
                    share = left_out @ grad_ND[start:end] / (last - takers.start)
                self.entering[takers] += share
            self._documents.append(_Document(slice(start, end), slice(first, last), takers, left_out, share))

    @property
    def needed(self) -> bool:
        """Whether anything is left out that kept rows stand in for; if not, `add` does nothing."""
        return bool(self._documents)

    def add(self, into_ND: Tensor, returned_KD: Tensor) -> None:
        """Adds a times g at the rows left out, and takes a times s back from those that stood in.

        Args:
            into_ND: gradient at the branch's input, in place.
            returned_KD: what the branch passed back at the kept rows.
        """
        for document in self._documents:
            a = _fit(self.entering[document.kept], returned_KD[document.kept]).to(into_ND.dtype)
            grad = self._grad[document.rows].to(into_ND.dtype)
            into_ND[document.rows].addcmul_(grad, (a * document.left_out.to(into_ND.dtype))[:, None])
            if document.share is not None:
                back = (-a * document.share.to(into_ND.dtype)).expand(document.takers.stop - document.takers.start, -1)
                into_ND.index_add_(0, self._rows[document.takers], back)


def _fit(entering_KD: Tensor, returned_KD: Tensor) -> Tensor:
    """Least squares of returned = a * entering, a in [-1, 1] so that no gradient can grow without bound; 0-dim."""

    def dot(left: Tensor, right: Tensor) -> Tensor:
        # Row by row, so that nothing of the rows' width is written and no long sum is rounded to a short dtype.
        with torch.autocast(left.device.type, enabled=False):
            by_row = left[:, None, :] @ right[:, :, None]
        return by_row.sum(dtype=torch.float64 if left.dtype == torch.float64 else torch.float32)

    returned_KD = returned_KD.to(entering_KD.dtype)
    size = dot(entering_KD, entering_KD)
    return torch.where(size > 0, dot(entering_KD, returned_KD) / size, 0.0).clamp(-1, 1)
