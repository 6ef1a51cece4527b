"""The exact scores of attention (paper equations 1-2), beside torch's attention forward of the same heads.

`python -m benchmarks.record_scores TOKENS FILE.jsonl`, on a GPU; bf16, blocks of 64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo.bench import records
from lemo.bench.ops import op_row
from lemo.bench.records import Record
from lemo.selection.scores import block_pair_scores

# Heads, heads of keys and values, numbers in a head.
SHAPES = {"llama-3-8b": (32, 8, 128), "llama-2-7b": (32, 32, 128), "smollm2-135m": (9, 3, 64)}


@torch.no_grad()
def measure(shape: str, T: int) -> list[Record]:
    """Rows of one shape."""
    H, K, d = SHAPES[shape]
    q, k, v = (torch.randn(heads, T, d, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K))

    def scores(mass: bool) -> Callable[[], Tensor]:
        return lambda: block_pair_scores(q, k, d**-0.5, 64, None, mass)

    def attention(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=H != K)

        return run

    calls = {
        "the paper's": scores(False),
        "softmax mass": scores(True),
        "FlashAttention-2 forward": attention(SDPBackend.FLASH_ATTENTION),
        "cuDNN attention forward": attention(SDPBackend.CUDNN_ATTENTION),
    }
    return [op_row(f"exact scores: {name}", "lemo-forward", shape, T, run, "cuda") for name, run in calls.items()]


if __name__ == "__main__":
    tokens, file = sys.argv[1:]
    records.write([row for shape in SHAPES for row in measure(shape, int(tokens))], Path(file))
