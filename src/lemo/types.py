"""The values that travel between rooms: where documents lie in a batch, and which of their tokens are kept.

Shapes: B batch, T tokens in a sequence. A *row* is an index into the flattened B·T tokens, int64 (DESIGN 4.10).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Index of a layer, and 'attention' or 'mlp'.
Key = tuple[int, str]


@dataclass
class Mean:
    """Of what was added: a sum, since not everybody collects."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float, times: int = 1) -> None:
        self.total += times * value
        self.count += times


@dataclass(frozen=True)
class SequenceLayout:
    """Documents and blocks of one batch (DESIGN 4.2: blocks count from each document's first real token).

    Attributes:
        shape: (B, T).
        documents: (first, end) rows of each document, ascending; padding belongs to none.
        block_of_row: int64 [B·T], index of the row's block over the whole batch, -1 for padding.
        document_of_block: int64 [blocks], ascending.
        block_tokens: int64 [blocks], tokens in each block (only a document's last can be short).
        first_row_of_block: int64 [blocks].
        first_block: int64 [documents], each document's first block.
        edge_block: bool [blocks], the first and the last of each document.
        block_size: tokens per block.
        host: the same with its tensors on the CPU, so that a plan costs one transfer from the device; None where
            they are there already.
        made: what selections derived from it, once for all layers.
    """

    shape: tuple[int, int]
    documents: tuple[tuple[int, int], ...]
    block_of_row: Tensor
    document_of_block: Tensor
    block_tokens: Tensor
    first_row_of_block: Tensor
    first_block: Tensor
    edge_block: Tensor
    block_size: int
    host: SequenceLayout | None = None
    made: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def on_host(self) -> SequenceLayout:
        """This layout with its tensors on the CPU."""
        return self.host or self

    @property
    def rows(self) -> int:
        """B·T."""
        return self.shape[0] * self.shape[1]

    @functools.cached_property
    def real_tokens(self) -> int:
        """Rows that belong to a document."""
        return sum(end - first for first, end in self.documents)

    @functools.cached_property
    def blocks_per_document(self) -> tuple[int, ...]:
        return tuple(-(-(end - first) // self.block_size) for first, end in self.documents)

    @property
    def packed(self) -> bool:
        """Whether any sequence holds more than one document."""
        return len(self.documents) > len({first // self.shape[1] for first, _ in self.documents})


@dataclass(frozen=True)
class TokenPlan:
    """The kept tokens of one branch (or of a whole layer) in one step.

    Attributes:
        rows: int64 [kept], sorted rows.
        cu_seqlens: kept tokens of each document, cumulated, from 0; length documents + 1.
        keep: kept tokens / real tokens.
        fidelity: share of the squared gradient norm the kept blocks hold (mean over documents); None in `forward`.
        known_rows: `host_rows` where the plan was made of them.
    """

    rows: Tensor
    cu_seqlens: tuple[int, ...]
    keep: float
    fidelity: float | None = None
    known_rows: Tensor | None = None

    @functools.cached_property
    def host_rows(self) -> Tensor:
        """`rows` on the CPU; waits for the device where a selection was made there."""
        return self.rows.cpu() if self.known_rows is None else self.known_rows


@dataclass(frozen=True)
class NormWeights:
    """A norm over a row's D numbers, as a kernel takes it.

    Attributes:
        weight: [D].
        bias: [D] or None.
        eps: added to the mean square (variance).
        centered: whether the mean is taken away first (LayerNorm) or not (RMS norm).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


@dataclass(frozen=True)
class StepStats:
    """What a model left out since the last `Runtime.collect`, averaged over micro-batches.

    Attributes:
        keep: per layer, (attention, mlp) share of tokens kept; (1, 1) where nothing was left out.
        fidelity: per layer, None where the mode has none.
        density: share of causal attention computed in the forward, in mode `forward` of that among kept tokens; mean
            over layers, None where queries see everything.
    """

    keep: tuple[tuple[float, float], ...]
    fidelity: tuple[float | None, ...]
    density: float | None = None

    @property
    def keep_mean(self) -> float:
        """Mean over layers and branches."""
        flat = [value for pair in self.keep for value in pair]
        return sum(flat) / len(flat) if flat else 1.0

    @property
    def fidelity_mean(self) -> float | None:
        """Mean over the layers that have one."""
        known = [value for value in self.fidelity if value is not None]
        return sum(known) / len(known) if known else None
