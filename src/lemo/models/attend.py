"""The `attend` axis in a model: attention by lists of key blocks in the place of the model's own, while it trains.

As for documents without a mask (`lemo.models.documents`), the attention implementation is one registered here while a
sparsified decoder runs, and everything else is the unmodified model. The first run of a layer call chooses its lists;
what recomputes the layer, checkpointing or `backward` mode, finds them in the call and obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lemo.config import Attend
from lemo.kernels.block_lists import BlockLists
from lemo.models.documents import stands_in
from lemo.selection.attend import AttendGrid, choose_blocks
from lemo.sparse.attend import attend_lists
from lemo.sparse.parts import part
from lemo.sparse.precision import computes_in
from lemo.types import TokenPlan

if TYPE_CHECKING:
    from lemo.models.runtime import BatchState

CALL = "lemo_attend"
_NAME = "lemo_attend"


@dataclass
class AttendCall:
    """One call of one layer.

    Attributes:
        state: of the batch.
        asked: of this layer.
        window: the layer's sliding window in tokens, or None.
        draw: gives the seed of a random choice.
        grid, lists: what the first run chose; None before it.
    """

    state: BatchState
    asked: Attend
    window: int | None
    draw: Callable[[], int]
    grid: AttendGrid | None = None
    lists: BlockLists | None = None

    def lists_for(self, q_HNd: Tensor, k_KMd: Tensor, scale: float) -> BlockLists:
        """The lists, chosen by these queries and keys of all rows if this is the first run."""
        if self.lists is None:
            with part("selection"):
                self.grid = self.state.attend_grid(self.asked, k_KMd.shape[0], self.window)
                self.lists = choose_blocks(self.grid, q_HNd, k_KMd, scale, self.draw)
        return self.lists

    def attend_kept(self, q_HNd: Tensor, k_KNd: Tensor, v_KNd: Tensor, scale: float, plan: TokenPlan) -> Tensor:
        """Attention among a plan's rows, [N, H, d]."""
        q_HNd, k_KNd, v_KNd = _as_autocast(q_HNd, k_KNd, v_KNd)
        if self.lists is None:
            with part("selection"):
                self.grid = self.state.grid_of_kept(self.asked, plan, k_KNd.shape[0], self.window)
                self.lists = choose_blocks(self.grid, q_HNd, k_KNd, scale, self.draw)
        return attend_lists(q_HNd, k_KNd, v_KNd, self.lists, None, scale)

    def attend(self, q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, scale: float, host_rows: Tensor | None) -> Tensor:
        """Attention of these rows' queries, or of all, over all rows' keys, [N, H, d]."""
        q_HNd, k_KMd, v_KMd = _as_autocast(q_HNd, k_KMd, v_KMd)
        lists = self.lists if host_rows is not None else self.lists_for(q_HNd, k_KMd, scale)
        assert lists is not None, "the dense forward chooses before rows are recomputed"
        return attend_lists(q_HNd, k_KMd, v_KMd, lists, host_rows, scale)


def _as_autocast(*x: Tensor) -> tuple[Tensor, ...]:
    """As torch's autocast does for its own attention; rotated queries are fp32 under it. Blocks are chosen by these."""
    return tuple(t.to(computes_in(t.device.type, t.dtype)) for t in x)


def attention_by_lists(config: Any) -> AbstractContextManager[None]:
    """Inside, a model with this configuration builds no mask, and its attention needs the keyword `CALL`."""
    return stands_in(config, _NAME, _attend)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: query [B, H, T, d], key and value [B, K, T, d] to [B, T, H, d]."""
    refuse_dropout(dropout)
    B, H, T, d = query.shape
    q, k, v = (x.transpose(0, 1).reshape(x.shape[1], B * T, d) for x in (query, key, value))
    call: AttendCall = kwargs[CALL]
    return call.attend(q, k, v, d**-0.5 if scaling is None else scaling, None).view(B, T, H, d), None


def refuse_dropout(p: float) -> None:
    """Raises ValueError for attention dropout, which a sparse softmax has no masks for."""
    if p > 0.0:
        raise ValueError(f"attend has no attention dropout; set the model's attention_dropout to 0 (it is {p:g})")
