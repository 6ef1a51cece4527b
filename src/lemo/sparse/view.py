"""What sparse execution needs to know of a decoder layer; `lemo.models` provides it for each architecture.

N any number of rows, D hidden size, H query heads, K key/value heads, d head size. A rotary pair is (cos, sin) for
the rows at hand, or None. Projections, norms and MLPs are called as modules, so LoRA, QLoRA and biases compose.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor, nn

from lemo.types import NormWeights

Rotary = tuple[Tensor, Tensor] | None
Branch = Literal["attention", "mlp"]


class LayerView(Protocol):
    """One decoder layer, taken apart without being changed."""

    @property
    def module(self) -> nn.Module:
        """The decoder layer itself."""

    @property
    def post_norm(self) -> bool:
        """Whether norms sit on the residual path, after each addition (OPT-350M)."""

    @property
    def scaling(self) -> float:
        """Factor on q·k inside attention."""

    @property
    def window(self) -> int | None:
        """Sliding window in tokens, None for full attention."""

    @property
    def attention_dropout(self) -> float:
        """Probability in effect now: 0 unless training."""

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout is in effect now, LoRA's included."""

    @property
    def mlp_row_bytes(self) -> int:
        """Bytes one row's activations take inside the MLP."""

    def fused(self, store_less: bool = False) -> AbstractContextManager[None]:
        """Inside, adapters, norms and MLPs of the layer that are recognised take fewer passes over memory.

        Args:
            store_less: recompute cheap inputs of linears in the backward; not inside a checkpoint.
        """

    def attention_norm(self, hidden_ND: Tensor) -> Tensor:
        """The norm of the attention branch."""

    def mlp_norm(self, hidden_ND: Tensor) -> Tensor:
        """The norm of the MLP branch."""

    @property
    def attention_norm_weights(self) -> NormWeights | None:
        """The attention branch's norm, for a kernel that computes it by itself; None if it isn't known."""

    @property
    def mlp_norm_weights(self) -> NormWeights | None:
        """The MLP branch's."""

    def query(self, normed_ND: Tensor, rotary: Rotary) -> Tensor:
        """Positioned queries [H, N, d]."""

    def key_value(self, normed_ND: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Positioned keys and values, each [K, N, d]."""

    def rotate(self, heads_NHd: Tensor, rotary: Rotary) -> Tensor:
        """Heads positioned as the layer's own are, [H, N, d]."""

    def query_key_value(self, normed_ND: Tensor, rotary: Rotary, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three of the same rows.

        Args:
            normed_ND: the branch's input at these rows.
            rotary: of all rows, unlike the others'.
            rows_N: int64, which they are.
        """

    def attention_output(self, context_NHd: Tensor) -> Tensor:
        """Output projection (and hidden dropout) of [N, H·d]: the attention branch's output [N, D]."""

    def mlp(self, normed_ND: Tensor) -> Tensor:
        """The MLP branch's output [N, D], hidden dropout included."""

    def mlp_activity(self, normed_ND: Tensor) -> Tensor:
        """Mean over neurons of |act(gate)·up| (or |act|) of each row, fp32 [N] (paper section 4.1)."""
