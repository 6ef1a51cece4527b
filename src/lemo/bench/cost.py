"""How many floating-point operations a training step needs, by method: what a measured time is compared with.

In units of a layer's dense forward, with frozen weights (no gradients for them) and LoRA's own products left out (rank
16 of 4,096 adds less than 1%):

| | linears | attention |
|---|---|---|
| LoRA | 2: forward, gradient | 3.5: forward 1, backward 2.5 |
| with gradient checkpointing | 3 | 4.5 |
| `backward` | 1 + 2 keep, and keys and values of all rows again: forward, gradient | 1 + 3.5 s |

s is the kept queries' share of the causal work. A multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lemo.bench.shapes import SHAPES
from lemo.types import TokenPlan

TERA = 1e12


def step_flop(shape: str, layers: int, T: int, labels: int, method: str, keep: float = 1.0, work: float = 1.0) -> float:
    """Operations of one step of one sequence.

    Args:
        shape: a key of `SHAPES`.
        layers: of the measured model.
        T: tokens.
        labels: labelled tokens; the loss's products run over these alone.
        method: as in the records; Liger's loss runs over all tokens.
        keep: `lemo-backward`: share of tokens kept.
        work: `lemo-backward`: s, see `causal_work`.
    """
    values = SHAPES[shape]
    D, heads, kv_heads = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    d = values.get("head_dim", D // heads)
    key_value = 2 * T * 2 * D * kv_heads * d
    linear = key_value + 2 * T * (2 * D * heads * d + 3 * D * values["intermediate_size"])
    attention = 2 * T * (T + 1) * heads * d  # q·k and p·v, each 2·d for each visible pair
    head = 3 * 2 * (T if "liger" in method else labels) * D * values["vocab_size"]
    if method == "lemo-backward":
        # Keys and values aren't recomputed for kept rows twice: 2·keep counts theirs already.
        a_layer = linear * (1 + 2 * keep) + 2 * (1 - keep) * key_value + attention * (1 + 3.5 * work)
    elif method == "lora":
        a_layer = 2 * linear + 3.5 * attention
    else:
        a_layer = 3 * linear + 4.5 * attention
    return float(layers * a_layer + head)


def causal_work(plans: Iterable[TokenPlan], T: int) -> float:
    """The kept queries' share of one sequence's causal attention work, mean over plans; 1 without plans."""
    shares = [float((plan.host_rows.double() + 1).sum()) / (T * (T + 1) / 2) for plan in plans]
    return sum(shares) / len(shares) if shares else 1.0


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
