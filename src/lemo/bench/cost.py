"""How many floating-point operations a training step needs, by method: what a measured time is compared with.

In units of a layer's dense forward, with frozen weights (no gradients for them) and LoRA's own products left out (rank
16 of 4,096 adds less than 1%):

| | linears | attention |
|---|---|---|
| LoRA | 2: forward, gradient | 3.5: forward 1, backward 2.5 |
| with gradient checkpointing | 3 | 4.5 |
| `backward` | 1 + 2 keep, and keys and values of all rows again: forward, gradient | 1 + 3.5 s |
| `forward` | 2 keep, with checkpointing 3 keep, of each branch; what predictors read and pair once | 3.5 s, 4.5 s |
| LongLoRA | as LoRA | 3.5 r, 4.5 r |
| `attend` | 3 | 4.5 r |
| `backward+attend` | as `backward` | r + 3.5 s |

s is the share of the causal work: in `backward` the kept queries', with `attend` what these see, in `forward` the kept
queries' with the kept keys; r the density of what queries see. A multiplication and an addition are two operations.
`lemo.bench.cost_memory` counts bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lemo.bench.shapes import SHAPES, Widths
from lemo.bench.step_config import LIGER, checkpointed
from lemo.selection.attend import AttendGrid
from lemo.selection.predictor_config import PredictorConfig
from lemo.selection.scores import sampled_share
from lemo.types import TokenPlan

TERA = 1e12


def grouped_work(groups: int) -> float:
    """Share of the causal work in LongLoRA: half of the heads in so many long groups, half in one fewer, two halves."""
    return (1 / groups + (groups - 1 / 2) / groups**2) / 2


def step_flop(
    shape: str,
    layers: int,
    T: int,
    labels: int,
    method: str,
    keep: float = 1.0,
    work: float = 1.0,
    mlp_keep: float | None = None,
    density: float = 1.0,
) -> float:
    """Operations of one step of one sequence.

    Args:
        shape: a key of `SHAPES`.
        layers: of the measured model.
        T: tokens.
        labels: labelled tokens; the loss's products run over these alone.
        method: as in the records; Liger's loss runs over all tokens, and so does the one of all logits.
        keep: share of tokens kept: by `lemo-backward`, or by `lemo-forward` in attention.
        work: s, see `causal_work`, `attended_work` and `kept_work`.
        mlp_keep: the same as `keep` in `lemo-forward`'s MLPs; None if equal.
        density: r.
    """
    if method.startswith("lemo-backward"):
        return sum(part_flop(shape, layers, T, labels, keep, work, density).values())
    unit = _Units(shape, T)
    linear, attention = (3.0, 4.5) if checkpointed(method) else (2.0, 3.5)
    head = unit.head(T if method in (LIGER, "lora+logits") else labels)
    if not method.startswith("lemo-forward"):
        return layers * (linear * unit.linear + attention * density * unit.attention) + head
    kept = keep * unit.attention_linear + (keep if mlp_keep is None else mlp_keep) * unit.mlp_linear
    return layers * (linear * kept + attention * work * unit.attention + unit.choice) + head


def part_flop(
    shape: str, layers: int, T: int, labels: int, keep: float, work: float, density: float = 1.0
) -> dict[str, float]:
    """Operations of `lemo-backward`'s step by part and kind, as `lemo.bench.parts` names them; arguments as above."""
    unit = _Units(shape, T)
    kept = keep * (unit.linear - unit.key_value)
    a_layer = {
        "forward attention": density * unit.attention,
        "forward linears": unit.linear,
        "keys and values linears": unit.key_value,
        "recompute attention": work * unit.attention,
        "recompute linears": kept,
        "backward attention": 2.5 * work * unit.attention,
        "backward linears": kept + unit.key_value,
    }
    return {**{name: layers * flop for name, flop in a_layer.items()}, "loss linears": unit.head(labels)}


class _Units:
    """Operations of one layer's dense forward."""

    def __init__(self, shape: str, T: int) -> None:
        w = Widths.of(shape)
        self.key_value = float(2 * T * 2 * w.D * w.K)
        self.attention_linear = self.key_value + 2 * T * 2 * w.D * w.A
        self.mlp_linear = float(2 * T * len(w.mlp) * w.D * w.F)
        self.linear = self.attention_linear + self.mlp_linear
        # Score heads' queries and keys, their products for each visible pair, far ones for some queries; the first
        # matrix of the MLP's predictor.
        predictor = PredictorConfig()
        heads, keys = (w.d * count for count in predictor.heads_left(w.d, w.A // w.d))
        self.choice = float(2 * T * w.D * (heads + keys + predictor.widths[0]) + sampled_share(T) * T * (T + 1) * heads)
        # q·k and p·v, each 2·d for each visible pair.
        self.attention = float(2 * T * (T + 1) * w.A)
        # Logits and the gradient of the hidden states; a frozen head's own gradient isn't computed.
        self._a_row = 2 * 2 * w.head * SHAPES[shape]["vocab_size"]

    def head(self, rows: int) -> float:
        """The language-model head's products with the loss of so many rows, forward and backward."""
        return float(rows * self._a_row)


def causal_work(plans: Iterable[TokenPlan], T: int) -> float:
    """The kept queries' share of one sequence's causal attention work, mean over plans; 1 without plans."""
    shares = [float((plan.host_rows.double() + 1).sum()) / (T * (T + 1) / 2) for plan in plans]
    return sum(shares) / len(shares) if shares else 1.0


def kept_work(plans: Iterable[TokenPlan], T: int) -> float:
    """The kept tokens' attention among themselves as a share of one sequence's causal work, mean over plans."""
    shares = [len(plan.host_rows) * (len(plan.host_rows) + 1) / (T * (T + 1)) for plan in plans]
    return sum(shares) / len(shares) if shares else 1.0


def attended_work(plans: Mapping[tuple[int, str], TokenPlan], grids: Mapping[int, AttendGrid], T: int) -> float:
    """What kept queries see, as a share of one sequence's causal attention, mean over layers; without plans all queries
    are kept. In `forward` mode a grid's rows are the kept tokens themselves."""
    shares = []
    for layer, grid in grids.items():
        plan = plans.get((layer, "attention"))
        rows = None if plan is None or len(plan.host_rows) == grid.grid.rows else plan.host_rows
        shares.append(grid.pairs(rows) / (T * (T + 1) / 2))
    return sum(shares) / len(shares)


def matmul_ceiling(device: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a large matrix product reaches on this GPU, the best of ten; None on a CPU."""
    if device == "cpu":
        return None
    n = 8192
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        left @ right
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return 2 * n**3 / best
