"""A decoder layer taken apart by its architecture's row; implements `lemo.sparse.view.LayerView`.

Modules are looked up at each call, because PEFT replaces linears after a model has been sparsified.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.errors import UserError
from lemo.models.architectures import Architecture
from lemo.models.fused import fused
from lemo.models.lora import linears_of_one_input
from lemo.models.norms import norm_weights
from lemo.models.rotary import rotated, rotation_of
from lemo.selection.score_heads import Projection
from lemo.sparse.view import Rotary
from lemo.types import NormWeights

_MISSING: Any = object()


class ArchitectureView:
    """See `LayerView` for shapes and meaning."""

    def __init__(self, layer: nn.Module, row: Architecture) -> None:
        self.module = layer
        self.row = row

    def _part(self, name: str) -> Any:
        return getattr(self.module, name)

    @property
    def _attention(self) -> Any:
        return getattr(self.module, self.row.attention)

    @property
    def _mlp_home(self) -> Any:
        return self.module if self.row.mlp is None else getattr(self.module, self.row.mlp)

    @property
    def attention_module(self) -> nn.Module:
        return self._attention

    @property
    def mlp_ends(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose input and output are the MLP's."""
        if self.row.mlp is not None:
            return self._mlp_home, self._mlp_home
        return self._part(self.row.up), self._part(self.row.down)

    @property
    def post_norm(self) -> bool:
        return self.row.pre_norm_flag is not None and not self._part(self.row.pre_norm_flag)

    @property
    def scaling(self) -> float:
        return 1.0 if self.row.scale_query else float(self._attention.scaling)

    @property
    def window(self) -> int | None:
        # Qwen2/Qwen3 decide per layer and store the result, perhaps inside a wrapper; Mistral reads its config.
        attention = self._attention
        stored = getattr(attention, "sliding_window", _MISSING)
        return getattr(attention.config, "sliding_window", None) if stored is _MISSING else stored

    @property
    def attention_dropout(self) -> float:
        attention = self._attention
        p = getattr(attention, "attention_dropout", None)
        return float(attention.dropout if p is None else p) if attention.training else 0.0

    @property
    def head_size(self) -> int:
        return int(self._attention.head_dim)

    @property
    def hidden_dropout(self) -> float:
        p = 0.0 if self.row.hidden_dropout is None else self._part(self.row.hidden_dropout)
        return float(p) if self.module.training else 0.0

    @property
    def has_dropout(self) -> bool:
        return self.attention_dropout > 0.0 or self.hidden_dropout > 0.0 or _drops(self.module)

    @property
    def mlp_row_bytes(self) -> int:
        up = getattr(self._mlp_home, self.row.up)
        # up, gate, their product and the activation live at once.
        return 4 * up.out_features * up.weight.element_size()

    @property
    def linears_by_input(self) -> list[list[nn.Module]]:
        """The layer's linears, those that run on one input together."""
        attention, home, row = self._attention, self._mlp_home, self.row
        mlp = [[getattr(home, name)] for name in (row.gate, row.up, row.down) if name]
        heads = [getattr(attention, name) for name in (row.query, row.key, row.value)]
        return [heads, [getattr(attention, row.output)], *mlp]

    def fused(self, store_less: bool = False) -> AbstractContextManager[None]:
        attention, home, row = self._attention, self._mlp_home, self.row
        linears = [linear for group in self.linears_by_input for linear in group]
        norms = [self._part(name) for name in (row.attention_norm, row.mlp_norm)]
        norms += [getattr(attention, name) for name in (row.query_norm, row.key_norm) if name]
        mlps = [home] if row.mlp and row.gate else []
        activations = [] if row.mlp else [self._part(row.activation)]
        return fused(linears, norms, mlps, activations, store_less)

    def attention(self, normed_BTD: Tensor, **kwargs: Any) -> Tensor:
        """The unmodified attention module's output (and hidden dropout), as the layer calls it."""
        return self._drop(self._attention(hidden_states=normed_BTD, **kwargs)[0])

    def attention_norm(self, hidden_ND: Tensor) -> Tensor:
        return self._part(self.row.attention_norm)(hidden_ND)

    def mlp_norm(self, hidden_ND: Tensor) -> Tensor:
        return self._part(self.row.mlp_norm)(hidden_ND)

    @property
    def attention_norm_weights(self) -> NormWeights | None:
        return norm_weights(self._part(self.row.attention_norm))

    @property
    def mlp_norm_weights(self) -> NormWeights | None:
        return norm_weights(self._part(self.row.mlp_norm))

    def _heads(self, projected: Tensor, norm: str | None) -> Tensor:
        """[N, heads, d]"""
        attention = self._attention
        heads = projected.view(projected.shape[0], -1, attention.head_dim)
        return heads if norm is None else getattr(attention, norm)(heads)

    def _query_heads(self, projected: Tensor) -> Tensor:
        if self.row.scale_query:
            projected = projected * self._attention.scaling
        return self._heads(projected, self.row.query_norm)

    def rotate(self, heads_NHd: Tensor, rotary: Rotary) -> Tensor:
        if rotary is None:
            return heads_NHd.transpose(0, 1)
        cos, sin = rotary
        rows = torch.arange(len(heads_NHd), device=heads_NHd.device)
        # They rotate a pair.
        return rotated(rotation_of(self._attention), heads_NHd, heads_NHd[:, :1], cos, sin, rows)[0]

    def _positioned(self, heads_NHd: Tensor, rotary: Rotary) -> Tensor:
        """As `rotate`, by transformers' own function."""
        heads_HNd = heads_NHd.transpose(0, 1)
        if rotary is None:
            return heads_HNd
        cos, sin = rotary
        return rotation_of(self._attention)(heads_HNd[None], heads_HNd[None, :1], cos[None], sin[None])[0][0]

    def query(self, normed_ND: Tensor, rotary: Rotary) -> Tensor:
        return self._positioned(self._query_heads(getattr(self._attention, self.row.query)(normed_ND)), rotary)

    def key_value(self, normed_ND: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        attention = self._attention
        key = self._heads(getattr(attention, self.row.key)(normed_ND), self.row.key_norm)
        value = self._heads(getattr(attention, self.row.value)(normed_ND), None)
        return self._positioned(key, rotary), value.transpose(0, 1)

    def head_projections(self, normed_ND: Tensor) -> tuple[Projection, Projection]:
        """What makes queries and keys of such inputs, before they are positioned; in evaluation mode.

        Raises:
            UserError: a norm of heads that isn't known.
        """
        attention, row = self._attention, self.row
        query_factor = float(attention.scaling) if row.scale_query else 1.0
        return (
            self._projection(row.query, row.query_norm, normed_ND[:1], query_factor),
            self._projection(row.key, row.key_norm, normed_ND[:1], 1.0),
        )

    def _projection(self, name: str, norm: str | None, like_1D: Tensor, factor: float) -> Projection:
        matrix, bias = (factor * x.float() for x in affine_of(getattr(self._attention, name), like_1D))
        matrix, bias = (x.unflatten(0, (-1, self.head_size)) for x in (matrix, bias))
        if norm is None:
            return Projection(matrix, bias)
        weights = norm_weights(getattr(self._attention, norm))
        if weights is None or weights.centered:
            raise UserError(
                f"{norm} of {type(self._attention).__name__} is no RMS norm that lemo knows, or has hooks: score heads "
                "can't take it over"
            )
        return Projection(matrix, bias, weights.weight.detach().float(), weights.eps)

    def query_key_value(self, normed_ND: Tensor, rotary: Rotary, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, row = self._attention, self.row
        linears = [getattr(attention, name) for name in (row.query, row.key, row.value)]
        q, k, v = linears_of_one_input(linears, normed_ND)
        query, key = self._query_heads(q), self._heads(k, row.key_norm)
        value = self._heads(v, None).transpose(0, 1)
        if rotary is None:
            return query.transpose(0, 1), key.transpose(0, 1), value
        return *rotated(rotation_of(attention), query, key, *rotary, rows_N), value

    def attention_output(self, context_NHd: Tensor) -> Tensor:
        out = getattr(self._attention, self.row.output)(context_NHd)
        return self._drop(out)

    def mlp(self, normed_ND: Tensor) -> Tensor:
        if self.row.mlp is not None:
            return self._drop(self._part(self.row.mlp)(normed_ND))
        activation = self._part(self.row.activation)
        hidden = activation(self._part(self.row.up)(normed_ND))
        return self._drop(self._part(self.row.down)(hidden))

    def mlp_activity(self, normed_ND: Tensor) -> Tensor:
        home = self._mlp_home
        activation = getattr(home, self.row.activation)
        up = getattr(home, self.row.up)(normed_ND)
        active = activation(up) if self.row.gate is None else activation(getattr(home, self.row.gate)(normed_ND)) * up
        return active.abs().mean(-1, dtype=torch.float32)

    def _drop(self, branch: Tensor) -> Tensor:
        p = self.hidden_dropout
        return F.dropout(branch, p=p, training=True) if p > 0.0 else branch


@torch.no_grad()
def affine_of(linear: Any, like_1D: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [O, D] and offset [O] of a module that is linear in effect, whatever it is made of (bits, adapters).

    Args:
        linear: drops nothing now.
        like_1D: an input of it, for width, dtype and device.
    """
    bias = linear(torch.zeros_like(like_1D))[0]
    with torch.enable_grad():
        x = like_1D.new_zeros(len(bias), like_1D.shape[1]).requires_grad_()
        # The identity's gradient is the matrix, without the rounding that products beside an offset would have.
        (matrix,) = torch.autograd.grad(linear(x), x, torch.eye(len(bias), dtype=bias.dtype, device=bias.device))
    return matrix, bias


def _drops(module: nn.Module) -> bool:
    """Whether a dropout inside is in effect; torch's own walk makes names, too slow for every layer in every step."""
    waiting = [module._modules]
    while waiting:
        for one in waiting.pop().values():
            if isinstance(one, nn.Dropout) and one.training and one.p > 0.0:
                return True
            if one is not None and one._modules:
                waiting.append(one._modules)
    return False
