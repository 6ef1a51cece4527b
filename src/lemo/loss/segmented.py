"""Cross-entropy of a language-model head without the T×V logits (the paper's segment-based peak cutting).

The logits of 128K tokens over a vocabulary of 128,256 are 31 GiB in bfloat16; their fp32 copy and its
gradient are 125 GiB more. But a row's loss and gradient need that row's logits only, so we visit the labelled
rows in loss chunks and, while a chunk's logits exist, take both its loss and its gradient. What survives a
chunk is one loss a row, the gradient of its hidden states, and the summed gradients of the head's trainable
parameters.

Rejected: recomputing the logits in the backward pass (one more matmul with the model's largest matrix, and
dropout in a LoRA-wrapped head would need its random state replayed); a fused kernel on raw weights (LoRA,
bias and quantised heads would each need their own): the head is a module, and on a GPU a kernel takes its logits.

Shapes: N rows (tokens of the whole batch), R labelled rows, C rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lemo.kernels.dispatch import loss_backend

IGNORED = -100
CHUNK_MIB = 512
ROWS_MULTIPLE = 64
_ROWS_AT_ONCE = 4096


def segmented_cross_entropy(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    *,
    num_items: Tensor | float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of `head(hidden_ND)` against `labels_N`, at the labelled rows only, in chunks.

    Equals `F.cross_entropy(head(hidden_ND).float(), labels_N, reduction="sum") / num_items`.
    The gradient is taken in the forward pass and handed out, times the incoming gradient, in the backward:
    it reaches `hidden_ND` and the head's trainable parameters through autograd, never by writing `.grad`.

    Args:
        hidden_ND: hidden states after the final norm.
        head: module that maps [C, D] to [C, V]; called as a module, so LoRA, bias and quantised heads work.
        labels_N: int64, the token each row predicts (already shifted); -100 has no loss.
        num_items: divides the summed loss (labels of the accumulated batch); None: the number of labels here.
        chunk_rows: rows per chunk; None derives them from a budget of 512 MiB (see `_chunk_rows`).

    Returns:
        Scalar loss, fp32 (fp64 for an fp64 head); without any label a zero with zero gradients.

    Raises:
        ValueError: shapes don't match, or `chunk_rows` isn't positive.
    """
    rows_R = _labelled_rows(hidden_ND, labels_N)
    chunk = _chunk_rows(head, hidden_ND, chunk_rows)
    parameters = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or parameters):
        total = _SegmentedCrossEntropy.apply(hidden_ND, head, labels_N, rows_R, chunk, *parameters)
    else:
        total = _row_losses(hidden_ND, head, labels_N, rows_R, chunk).sum()
    if num_items is None:
        return total / max(rows_R.numel(), 1)
    items = torch.as_tensor(num_items, device=total.device).to(total.dtype)
    # An accumulated batch without any label has a loss of 0, not 0/0.
    return total / torch.where(items == 0, torch.ones_like(items), items)


@torch.no_grad()
def token_losses(hidden_ND: Tensor, head: nn.Module, labels_N: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """Cross-entropy of each row, without gradients and without N×V logits.

    Args and errors as in `segmented_cross_entropy`.

    Returns:
        fp32 [N], 0 where the label is -100.
    """
    rows_R = _labelled_rows(hidden_ND, labels_N)
    chunk = _chunk_rows(head, hidden_ND, chunk_rows)
    losses_N = torch.zeros(labels_N.shape[0], dtype=torch.float32, device=hidden_ND.device)
    return losses_N.index_copy_(0, rows_R, _row_losses(hidden_ND, head, labels_N, rows_R, chunk).to(losses_N.dtype))


class _SegmentedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the labelled rows. The head's trainable parameters are inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: nn.Module,
        labels_N: Tensor,
        rows_R: Tensor,
        chunk_rows: int,
        *parameters: nn.Parameter,
    ) -> Tensor:
        wants_hidden = hidden_ND.requires_grad
        gradient_RD = hidden_ND.new_empty(rows_R.numel(), hidden_ND.shape[1]) if wants_hidden else None
        sums: list[Tensor | None] = [None] * len(parameters)
        losses: list[Tensor] = []
        for start in range(0, rows_R.numel(), chunk_rows):
            rows_C = rows_R[start : start + chunk_rows]
            hidden_CD = hidden_ND.detach().index_select(0, rows_C).requires_grad_(wants_hidden)
            inputs = [hidden_CD, *parameters] if wants_hidden else list(parameters)
            loss_C, gradients = _chunk_loss_and_gradients(head, hidden_CD, labels_N[rows_C], inputs)
            losses.append(loss_C)
            if gradient_RD is not None:
                hidden_gradient = gradients.pop(0)
                # A head that ignores its input leaves no gradient; its rows are zero.
                gradient_RD[start : start + chunk_rows] = 0 if hidden_gradient is None else hidden_gradient
            sums = [_accumulate(total, gradient) for total, gradient in zip(sums, gradients, strict=True)]
        if not losses:
            sums = [torch.zeros_like(p) for p in parameters]
        ctx.save_for_backward(rows_R, gradient_RD, *sums)
        ctx.rows = hidden_ND.shape[0]
        ctx.dtypes = [p.dtype for p in parameters]
        return _concatenated(losses, hidden_ND).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows_R, gradient_RD, *sums = ctx.saved_tensors
        hidden_gradient = None
        if gradient_RD is not None:
            hidden_gradient = _times(gradient_RD, grad_output)
            if rows_R.numel() < ctx.rows:
                hidden_gradient = hidden_gradient.new_zeros(ctx.rows, hidden_gradient.shape[1]).index_copy_(
                    0, rows_R, hidden_gradient
                )
        parameter_gradients = [
            None if total is None else (total * grad_output).to(dtype)
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return hidden_gradient, None, None, None, None, *parameter_gradients


def _times(gradient_RD: Tensor, factor: Tensor) -> Tensor:
    """Their product, rounded once: 1 / labels alone, in half precision, would be off by up to 0.4%."""
    product_RD = torch.empty_like(gradient_RD)
    wide = torch.promote_types(gradient_RD.dtype, torch.float32)
    for product, gradient in zip(product_RD.split(_ROWS_AT_ONCE), gradient_RD.split(_ROWS_AT_ONCE), strict=True):
        product.copy_(gradient.to(wide) * factor)
    return product_RD


def _chunk_loss_and_gradients(
    head: nn.Module, hidden_CD: Tensor, labels_C: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses [C] of one chunk, and the gradient of their sum for each of `inputs` (None where unused)."""
    with torch.enable_grad(), _without_autocast_cache():
        logits_CV = head(hidden_CD)
    if _by_kernel(head, logits_CV):
        from lemo.kernels import cross_entropy

        loss_C = cross_entropy.row_losses(logits_CV.detach(), labels_C, gradient=logits_CV.requires_grad)
        if not logits_CV.requires_grad:
            return loss_C, [None] * len(inputs)
        # The kernel wrote the gradient over the logits, which a plain head doesn't need again.
        return loss_C, list(torch.autograd.grad(logits_CV, inputs, logits_CV.detach(), allow_unused=True))
    log_p_CV = _log_probabilities(logits_CV.detach())
    log_p_label_C1 = log_p_CV.gather(1, labels_C[:, None])
    if not logits_CV.requires_grad:
        return -log_p_label_C1[:, 0], [None] * len(inputs)
    # d(-log p_label)/d logits = p - 1[label], written over the log-probabilities.
    gradient_CV = log_p_CV.exp_().scatter_(1, labels_C[:, None], log_p_label_C1.expm1()).to(logits_CV.dtype)
    # In low precision the line above copied them; the fp32 original must not live through the backward.
    del log_p_CV
    gradients = torch.autograd.grad(logits_CV, inputs, gradient_CV, allow_unused=True)
    return -log_p_label_C1[:, 0], list(gradients)


def _row_losses(hidden_ND: Tensor, head: nn.Module, labels_N: Tensor, rows_R: Tensor, chunk_rows: int) -> Tensor:
    """Losses [R] of the labelled rows, without gradients."""
    losses = []
    with torch.no_grad():
        for rows_C in rows_R.split(chunk_rows):
            if rows_C.numel() == 0:
                continue
            logits_CV = head(hidden_ND.index_select(0, rows_C))
            if _by_kernel(head, logits_CV):
                from lemo.kernels import cross_entropy

                losses.append(cross_entropy.row_losses(logits_CV, labels_N[rows_C], gradient=False))
            else:
                losses.append(-_log_probabilities(logits_CV).gather(1, labels_N[rows_C][:, None])[:, 0])
    return _concatenated(losses, hidden_ND)


def _by_kernel(head: nn.Module, x: Tensor) -> bool:
    """Whether the kernel takes a head's logits, and may write over them.

    Args:
        x: the logits, or what goes into the head.
    """
    return loss_backend(x, _plain(head)) == "triton"


def _plain(head: nn.Module) -> bool:
    """A linear that nobody listens to: its backward doesn't read its output."""
    return type(head) is nn.Linear and not (head._forward_hooks or head._backward_hooks or "forward" in head.__dict__)


def _log_probabilities(logits_CV: Tensor) -> Tensor:
    return F.log_softmax(logits_CV, dim=-1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))


def _concatenated(losses: Sequence[Tensor], hidden_ND: Tensor) -> Tensor:
    """All rows' losses in one tensor, so that one sum (a tree, not a chain) adds them up."""
    if losses:
        return torch.cat(list(losses))
    return torch.zeros(0, dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device)


def _accumulate(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Adds in fp32 (fp64 for fp64): a bf16 sum over hundreds of chunks would stop growing."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total.add_(gradient)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Keeps the caller's autocast but not its weight cache, which may hold a cast made under no_grad.

    Such a cached cast has no graph, and the weight would silently get no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _labelled_rows(hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Indices (int64 [R]) of the rows whose label isn't -100."""
    if hidden_ND.dim() != 2 or labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"need hidden [N, D] and labels [N], not {tuple(hidden_ND.shape)} and {tuple(labels_N.shape)}: "
            "flatten batch and tokens, and align the labels with the rows that predict them"
        )
    return (labels_N != IGNORED).nonzero()[:, 0]


def _chunk_rows(head: nn.Module, hidden_ND: Tensor, asked: int | None) -> int:
    """Rows per chunk such that what lives on V columns stays within `CHUNK_MIB`.

    With s bytes an element of the head's output, a row needs at its peak, whichever is larger,
        (s + 12)·V  inside a LoRA-wrapped head: base output, fp32 LoRA output, the same scaled, and their sum;
        (s + 8)·V   in the loss: logits, their fp32 copy, fp32 log-probabilities (overwritten by the gradient).
    For V = 128,256 in bfloat16: 512 MiB / (14 · 128,256 B) = 298, rounded down to 256 rows. Each chunk reads the
    head's V·D weights for 2·C operations a weight, so fewer rows would leave a GPU (hundreds of operations a byte)
    waiting for memory. The gradient of a *trainable* head (V×D, plus its fp32 sum) comes on top; no chunking
    avoids it.

    A plain head's logits become their gradient in place (`lemo.kernels.cross_entropy`): a row needs s·V, so half of the
    budget holds 1,024 rows, with which the gradient's product fills a GPU too.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {asked}")
        return asked
    budget, bytes_each = CHUNK_MIB * 2**20, hidden_ND.element_size() + 12
    if _by_kernel(head, hidden_ND):
        budget, bytes_each = budget // 2, hidden_ND.element_size()
    rows = budget // (bytes_each * _vocabulary(head, hidden_ND))
    return max(rows // ROWS_MULTIPLE * ROWS_MULTIPLE, min(rows, ROWS_MULTIPLE), 1)


def _vocabulary(head: nn.Module, hidden_ND: Tensor) -> int:
    """Columns of the head's output; a head that doesn't tell is asked with a row of zeros."""
    width = getattr(head, "out_features", None)
    if isinstance(width, int):
        return width
    with torch.no_grad():
        return head(hidden_ND.new_zeros(1, hidden_ND.shape[1])).shape[-1]
