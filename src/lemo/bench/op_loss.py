"""Head and cross-entropy, forward and backward: the segmented loss, two libraries', and all logits at once.

All of them need the logits' product and its gradient's with the head, 4 T D V operations, and return the gradient of
the hidden states. The head is frozen, as in LoRA.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.bench.op import Op
from lemo.bench.ops_config import LossOps
from lemo.errors import UserError
from lemo.loss import segmented_cross_entropy

_PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def check_codes(settings: LossOps, device: str) -> None:
    """Refuses what can't run here.

    Raises:
        UserError: a library isn't installed, or needs a GPU.
    """
    for code, package in _PACKAGES.items():
        if code not in settings.codes:
            continue
        if importlib.util.find_spec(package) is None:
            raise UserError(f"loss code {code} needs {package}; install it, or leave {code} out of loss.codes")
        if device == "cpu":
            raise UserError(f"loss code {code} needs a GPU; leave it out of loss.codes, or give --device cuda")


def loss_ops(settings: LossOps, dtype: torch.dtype, device: str) -> Iterator[Op]:
    """The loss by every code asked for."""
    D, V = settings.width, settings.vocabulary
    for T in settings.lengths:
        for code in settings.codes:
            yield Op(
                op="loss",
                implementation=code,
                shape=f"width {D:,}, vocabulary {V:,}",
                T=T,
                keep=None,
                prepare=_preparation(code, T, D, V, dtype, device),
                flop=4.0 * T * D * V,
                handed_out=T * D * dtype.itemsize,
                method="lora",
            )


def _preparation(
    code: str, T: int, D: int, V: int, dtype: torch.dtype, device: str
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(0)
        hidden_TD = torch.randn(T, D, generator=generator, device=device, dtype=dtype).requires_grad_()
        head = nn.Linear(D, V, bias=False, device=device, dtype=dtype).requires_grad_(False)
        labels_T = torch.randint(V, (T,), generator=generator, device=device)
        loss = _CODES[code](hidden_TD, head, labels_T)

        def run() -> object:
            hidden_TD.grad = None
            value = loss()
            value.backward()
            return value

        return run

    return prepare


def _lemo(hidden_TD: Tensor, head: nn.Linear, labels_T: Tensor) -> Callable[[], Tensor]:
    return lambda: segmented_cross_entropy(hidden_TD, head, labels_T)


def _liger(hidden_TD: Tensor, head: nn.Linear, labels_T: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda: fused(head.weight, hidden_TD, labels_T)


def _cce(hidden_TD: Tensor, head: nn.Linear, labels_T: Tensor) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(hidden_TD, head.weight, labels_T)


def _logits(hidden_TD: Tensor, head: nn.Linear, labels_T: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(head(hidden_TD).float(), labels_T)


_CODES: dict[str, Callable[[Tensor, nn.Linear, Tensor], Callable[[], Tensor]]] = {
    "lemo": _lemo,
    "liger": _liger,
    "cce": _cce,
    "logits": _logits,
}
