"""Block-sparse attention of Llama-3-8B's heads: forward, backward and the choice of blocks, beside torch's attention.

`python -m benchmarks.record_attend TOKENS FILE.jsonl`, on a GPU; bf16.

Rates are per computed work: of a causal attention's operations (two products forward, five backward) the share that
the lists hold. `kept rows` are every eighth token's queries, over the same lists. Everything is measured in turns,
several times: a card's clock falls as it warms, by more than what is to be told apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo.bench import records
from lemo.bench.cost import TERA
from lemo.bench.ops import op_row
from lemo.bench.records import Record
from lemo.config import Attend
from lemo.kernels.block_sparse import Queries, block_sparse_backward, block_sparse_forward
from lemo.kernels.launches import launches_for
from lemo.selection.attend import AttendGrid, build_grid, choose_blocks
from lemo.selection.layout import build_layout
from lemo.types import SequenceLayout

SHAPE, H, K, D = "llama-3-8b", 32, 8, 128
SCALE = D**-0.5
DENSITIES = (0.15, 0.25, 1.0)
ROUNDS = 3
KEPT_EVERY = 8
Choice = Literal["none", "sampled"]
LOOK: float = Attend.model_fields["look"].default
PRODUCTS = {"forward": 2, "backward": 5}


@dataclass(frozen=True)
class Setting:
    """Queries [H, T, d], keys and values [K, T, d] of one sequence, and where its blocks lie."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    layout: SequenceLayout
    attend: AttendGrid

    def attention(self, host_rows: Tensor | None) -> tuple[Callable[[], object], Callable[[], object]]:
        """(forward, backward) of these rows' queries, or of all."""
        lists = choose_blocks(self.attend, self.q, self.k, SCALE, lambda: 0)
        which, k, v = Queries(lists, host_rows), self.k, self.v
        q = self.q if host_rows is None else self.q[:, host_rows.to("cuda")]
        out, lse = block_sparse_forward(q, k, v, which, SCALE)
        grad = torch.randn_like(out)
        return (
            lambda: block_sparse_forward(q, k, v, which, SCALE),
            lambda: block_sparse_backward(grad, q, k, v, out, lse, which, SCALE),
        )


def setting(T: int, density: float, block: int, choice: Choice, look: float = LOOK) -> Setting:
    """Random queries, keys and values."""
    drawn = [torch.randn(T, heads, D, device="cuda", dtype=torch.bfloat16).transpose(0, 1) for heads in (H, K, K)]
    layout = build_layout(1, T, 64, torch.device("cuda"))
    attend = build_grid(layout, Attend(density=density, block=block, choice=choice, look=look), K, None)
    name = f"density {density}, blocks of {block}" + ("" if choice == "none" else f", {choice}")
    if choice == "sampled":
        name += f", look {look}"
    return Setting(name, *drawn, layout, attend)


def measured(name: str, kind: str, work: float | None, T: int, run: Callable[[], object]) -> Record:
    """A row whose details have TFLOP/s of `work`, a share of causal attention."""
    row = op_row(f"{name} {kind}", "lemo-attend", SHAPE, T, run, "cuda")
    assert row.details is not None
    assert row.step_ms is not None
    row.density = work
    if work is not None:
        row.details["tflop_per_s"] = work * PRODUCTS[kind] * T * (T + 1) * H * D / (row.step_ms / 1000) / TERA
    return row


@torch.no_grad()
def block_sparse_rows(T: int, density: float, block: int, choice: Choice = "none", look: float = LOOK) -> list[Record]:
    """Choice, and attention of all rows and of kept ones, at one density."""
    s = setting(T, density, block, choice, look)
    rows = [
        measured(s.name, "grid", None, T, lambda: build_grid(s.layout, s.attend.attend, K, None)),
        measured(s.name, "choice", None, T, lambda: choose_blocks(s.attend, s.q, s.k, SCALE, lambda: 0)),
    ]
    for name, host_rows in (("all rows", None), ("kept rows", torch.arange(0, T, KEPT_EVERY))):
        work = s.attend.pairs(host_rows) / s.attend.causal_pairs
        for kind, run in zip(PRODUCTS, s.attention(host_rows), strict=True):
            row = measured(f"{s.name}, {name}:", kind, work, T, run)
            assert row.details is not None
            row.details["launches"] = asdict(launches_for(2 * D, block, s.q.device))
            rows.append(row)
    return rows


def dense_rows(T: int, backend: SDPBackend, name: str) -> list[Record]:
    """torch's causal attention by one backend."""
    q, k, v = (
        torch.randn(1, heads, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (H, K, K)
    )

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        forward = measured(f"{name}:", "forward", 1.0, T, attend)
    out = attend()
    grad = torch.randn_like(out)
    backward = lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
    return [forward, measured(f"{name}:", "backward", 1.0, T, backward)]


def one_round(T: int) -> list[Record]:
    """Every row once."""
    found = dense_rows(T, SDPBackend.FLASH_ATTENTION, "FlashAttention-2")
    found += dense_rows(T, SDPBackend.CUDNN_ATTENTION, "cuDNN")
    for share in DENSITIES:
        found += block_sparse_rows(T, share, 64)
    found += block_sparse_rows(T, DENSITIES[0], 128)
    found += block_sparse_rows(T, DENSITIES[0], 64, "sampled")
    for block, look in ((64, LOOK), (32, 0.25), (16, 0.5)):
        found += block_sparse_rows(T, 0.1, block, "sampled", look)
    return found


def middle(rows: Sequence[Record]) -> Record:
    """Of one thing's rows the one of median time, with the range of all."""
    row = sorted(rows, key=lambda row: row.step_ms or 0.0)[len(rows) // 2]
    row.step_ms_min = min(r.step_ms_min for r in rows if r.step_ms_min is not None)
    row.step_ms_max = max(r.step_ms_max for r in rows if r.step_ms_max is not None)
    return row


def table(rows: list[Record]) -> str:
    """Milliseconds and TFLOP/s, a line each."""
    lines = []
    for row in rows:
        rate = (row.details or {}).get("tflop_per_s")
        lines.append(f"{row.setting:58} {row.step_ms:9.2f} ms" + (f" {rate:6.0f} TFLOP/s" if rate else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    tokens, file = int(sys.argv[1]), sys.argv[2]
    found = [middle(rows) for rows in zip(*(one_round(tokens) for _ in range(ROUNDS)), strict=True)]
    records.write(found, Path(file))
    print(table(found))
