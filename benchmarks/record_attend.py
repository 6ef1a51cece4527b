"""Block-sparse attention of Llama-3-8B's heads: forward, backward and the choice of blocks, beside torch's attention.

`python -m benchmarks.record_attend TOKENS FILE.jsonl`, on a GPU; bf16. With `sweep` in the file's place it tries other
launches at density 0.15 and prints their times, to set those of `lemo.kernels.block_sparse` by.

Rates are per computed work: of a causal attention's operations (two products forward, five backward) the share that
the lists hold. `kept rows` are every eighth token's queries, over the same lists.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from benchmarks.ops import op_row
from lemo.bench import records
from lemo.bench.cost import TERA
from lemo.bench.records import Record
from lemo.config import Attend
from lemo.kernels import block_sparse
from lemo.kernels.block_sparse import Launch, Queries, block_sparse_backward, block_sparse_forward
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout

SHAPE, H, K, D = "llama-3-8b", 32, 8, 128
DENSITIES = (0.15, 0.25, 1.0)
KEPT_EVERY = 8
PRODUCTS = {"forward": 2, "backward": 5}


def measured(name: str, work: float, T: int, run: Callable[[], object]) -> Record:
    """A row whose details have TFLOP/s of `work`, a share of one product of causal attention."""
    row = op_row(name, "lemo-attend", SHAPE, T, run, "cuda")
    row.density = work
    products = next((n for kind, n in PRODUCTS.items() if name.endswith(kind)), 0)
    assert row.details is not None
    assert row.step_ms is not None
    row.details["tflop_per_s"] = work * products * T * (T + 1) * H * D / (row.step_ms / 1000) / TERA
    row.details["launch"] = {name: vars(getattr(block_sparse, name)) for name in ("FORWARD", "QUERIES", "KEYS")}
    return row


@torch.no_grad()
def block_sparse_rows(T: int, density: float, block: int) -> list[Record]:
    """Choice, and attention of all rows and of kept ones, at one density."""
    device = torch.device("cuda")
    q, k, v = (torch.randn(T, heads, D, device=device, dtype=torch.bfloat16).transpose(0, 1) for heads in (H, K, K))
    layout = build_layout(1, T, 64, device)
    attend = build_grid(layout, Attend(density=density, block=block), K, None)
    scale = D**-0.5
    name = f"density {density}, blocks of {block}"
    rows = [measured(f"{name}: grid", 0.0, T, lambda: build_grid(layout, attend.attend, K, None))]
    rows.append(measured(f"{name}: choice", 0.0, T, lambda: choose_blocks(attend, q, k, scale)))
    lists = choose_blocks(attend, q, k, scale)
    kept = torch.arange(0, T, KEPT_EVERY)
    share = attend.pairs(kept) / attend.causal_pairs
    for kind, queries, host_rows, work in (
        ("all rows", q, None, attend.density),
        ("kept rows", q[:, kept.to(device)], kept, share),
    ):
        which = Queries(lists, host_rows)
        out, lse = block_sparse_forward(queries, k, v, which, scale)
        grad = torch.randn_like(out)
        rows += both(f"{name}: {kind}", work, T, queries, k, v, out, lse, grad, which, scale)
    return rows


def both(name: str, work: float, T: int, q: Any, k: Any, v: Any, out: Any, lse: Any, grad: Any, which: Queries,
         scale: float) -> list[Record]:  # fmt: skip
    """Rows of the forward and of the backward."""
    return [
        measured(f"{name}, forward", work, T, lambda: block_sparse_forward(q, k, v, which, scale)),
        measured(f"{name}, backward", work, T, lambda: block_sparse_backward(grad, q, k, v, out, lse, which, scale)),
    ]


def dense_rows(T: int, backend: SDPBackend, name: str) -> list[Record]:
    """torch's causal attention by one backend."""
    q, k, v = (
        torch.randn(1, heads, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (H, K, K)
    )

    def attend() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        rows = [measured(f"{name}, forward", 1.0, T, attend)]
    out = attend()
    grad = torch.randn_like(out)
    rows.append(
        measured(f"{name}, backward", 1.0, T, lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    )
    return rows


def sweep(T: int) -> None:
    """Times of other launches, one kernel changed at a time; what doesn't fit a multiprocessor is left out."""
    for name in ("FORWARD", "QUERIES", "KEYS"):
        usual = getattr(block_sparse, name)
        for lanes, warps, stages in itertools.product((64, 128), (4, 8), (1, 2, 3, 4)):
            setattr(block_sparse, name, Launch(lanes, warps, stages))
            print(name, lanes, warps, stages, flush=True)
            try:
                block_sparse_rows(T, DENSITIES[0], 64)
            except OutOfResources as error:
                print(error, flush=True)
        setattr(block_sparse, name, usual)


def table(rows: list[Record]) -> str:
    """Milliseconds and TFLOP/s, a line each."""
    lines = []
    for row in rows:
        assert row.details is not None
        rate = row.details["tflop_per_s"]
        lines.append(f"{row.setting:55} {row.step_ms:9.2f} ms" + (f" {rate:6.0f} TFLOP/s" if rate else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    tokens, file = int(sys.argv[1]), Path(sys.argv[2])
    if file.name == "sweep":
        sys.exit(sweep(tokens))
    found = dense_rows(tokens, SDPBackend.FLASH_ATTENTION, "FlashAttention-2")
    found += dense_rows(tokens, SDPBackend.CUDNN_ATTENTION, "cuDNN")
    for share in DENSITIES:
        found += block_sparse_rows(tokens, share, 64)
    found += block_sparse_rows(tokens, DENSITIES[0], 128)
    records.write(found, file)
    print(table(found))
