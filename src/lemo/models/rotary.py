"""The model's own rotation of queries and keys; in one pass where it is transformers' and in half precision."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lemo.kernels.dispatch import rotary_backend
from lemo.sparse.rotary import rotate

Rotation = Callable[..., tuple[Tensor, Tensor]]
# q * cos + rotate_half(q) * sin, all of one text.
_KNOWN = {f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")}


def rotation_of(attention: nn.Module) -> Rotation:
    """transformers' function beside the attention module's class, which keeps its variant of RoPE; or beside that of
    what is wrapped in it."""
    for module in attention.modules():
        found: Rotation | None = getattr(import_module(type(module).__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    raise AttributeError(f"no apply_rotary_pos_emb beside {type(attention).__name__}")


def rotated(
    rotation: Rotation, q_NHd: Tensor, k_NKd: Tensor, cos_Td: Tensor, sin_Td: Tensor, rows_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Positioned queries [H, N, d] and keys [K, N, d].

    Args:
        rotation: transformers' function, or what somebody has put in its place.
        q_NHd, k_NKd: as they were projected.
        cos_Td, sin_Td: of all rows.
        rows_N: int64, which rows these are.
    """
    if rotary_backend(q_NHd, k_NKd, cos_Td, _reason_against(rotation)) == "triton":
        return rotate(q_NHd, k_NKd, cos_Td, sin_Td, rows_N)
    q, k = (x.transpose(0, 1)[None] for x in (q_NHd, k_NKd))
    q, k = rotation(q, k, cos_Td[rows_N][None], sin_Td[rows_N][None])
    return q[0], k[0]


def _reason_against(rotation: Any) -> str | None:
    module, name = (getattr(rotation, key, None) for key in ("__module__", "__qualname__"))
    return None if module in _KNOWN and name == "apply_rotary_pos_emb" else f"{module}.{name} isn't transformers' own"
