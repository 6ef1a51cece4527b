"""Cross-entropy in Triton: a row's loss, and over its logits their gradient.

Logits are read twice and written once, in their own dtype; arithmetic is fp32. Plain torch takes the logarithms of the
probabilities in fp32 beside them, and passes over these four times.

C rows, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.tiles import power_of_2

_COLUMNS = 8192


def row_losses(logits_CV: Tensor, labels_C: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[label] of each row, fp32 [C].

    Args:
        logits_CV: rows contiguous in memory. With `gradient` they become the gradient of the losses' sum.
        labels_C: int64, from 0 to V - 1.
        gradient: whether to write it.
    """
    C, V = logits_CV.shape
    losses_C = torch.empty(C, device=logits_CV.device, dtype=torch.float32)
    if C == 0:
        return losses_C
    columns = min(_COLUMNS, power_of_2(V))
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(logits_CV):
        _row_losses[(C,)](
            logits_CV, labels_C, losses_C, logits_CV.stride(0),
            V=V, BV=columns, GRADIENT=gradient, num_warps=max(4, min(16, columns // 512)),
        )  # fmt: skip
    return losses_C


@triton.jit
def _row_losses(LOGITS, LABELS, LOSSES, stride, V: tl.constexpr, BV: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0)
    logits = LOGITS + row.to(tl.int64) * stride
    label = tl.load(LABELS + row)
    # A label outside the vocabulary makes the loss NaN, and reads nothing of other rows.
    at_label = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    # Softmax's denominator but for the label's own term: 1 - p of the label is others / total, without cancellation.
    largest = at_label
    others = 0.0
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, 0))
        others = others * tl.exp(largest - now) + tl.sum(tl.where(v == label, 0.0, tl.exp(x - now)), 0)
        largest = now
    total = others + tl.exp(at_label - largest)
    tl.store(LOSSES + row, tl.log(total) + (largest - at_label))
    if GRADIENT:
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            g = tl.where(v == label, -others / total, tl.exp(x - largest) / total)
            tl.store(logits + v, g.to(LOGITS.dtype.element_ty), mask=v < V)
