"""Block-sparse attention at the sizes of real models, against fp32: values and every gradient.

The reference takes each query block's lists apart, gathers their keys and knows no masks of the kernels'. What may be
lost is what torch's own dense attention loses at the same precision on the same queries, keys and values. Small sizes
run on any device, in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.config import QUERY_BLOCKS, Attend
from lemo.kernels.block_lists import BlockLists
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout
from reference import all_listed

pytest.importorskip("triton")
from lemo.kernels import block_sparse as kernels

# Rows whose own size is below this share of the usual one are measured by that share: what cancels has no digits left.
FAINT = 0.3


@dataclass(frozen=True)
class Case:
    """Lengths of the documents, heads (H, K), d, and the attend axis's settings."""

    documents: tuple[int, ...]
    heads: tuple[int, int]
    d: int
    block: int
    choice: str = "pooled"
    window: int | None = None
    density: float = 0.4
    every: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        ends = torch.tensor(self.documents).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def __str__(self) -> str:
        H, K = self.heads
        words = [*map(str, self.documents), f"{H}/{K} of {self.d}", f"blocks {self.block}", self.choice]
        words += [f"window {self.window}"] * (self.window is not None) + [f"every {self.every}"] * (self.every > 1)
        return " ".join(words)


def cases(sizes: dict[str, Any], long: int, window: int, some: int) -> list[Case]:
    two = (long * 5 // 8 - 3, long - long * 5 // 8 + 1)
    return [
        Case(documents, choice=choice, window=cut, every=every, **sizes)
        for documents, choice, cut in (((long,), "pooled", None), (two, "none", None), (two, "pooled", window))
        for every in (1, some)
    ]


# Errors of a few rows say nothing of another precision's: every other row at the small sizes.
SMALL = [
    case
    for heads in ((6, 2), (2, 2))
    for case in cases({"heads": heads, "d": 16, "block": 16, "density": 0.5}, long=330, window=70, some=2)
]
REAL = [
    case
    for heads, d in (((32, 8), 128), ((8, 8), 128), ((9, 3), 64))
    for block in (64, 128)
    for case in cases({"heads": heads, "d": d, "block": block}, long=4608, window=1500, some=8)
]
LONG = [Case((16384,), (32, 8), 128, block, every=every) for block in (64, 128) for every in (1, 8)]


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    """Queries, keys and values as a projection leaves them, [heads, rows, d], and a gradient [rows, heads, d]; all
    rows. Queries lean to some stretch of the keys, a different one for each head, so that lists differ."""
    generator = torch.Generator(device).manual_seed(0)
    (H, K), T, d = case.heads, case.tokens, case.d

    def normal(heads: int) -> Tensor:
        return torch.randn(T, heads, d, generator=generator, device=device)

    slow = normal(K).cumsum(0) / torch.arange(1, T + 1, device=device)[:, None, None].sqrt()
    q = normal(H) + slow.roll(T // 3, 0).repeat_interleave(H // K, 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bf16 products
    drawn = [x.to(dtype) for x in (q, normal(K) + slow, normal(K), normal(H))]
    return [*(x.transpose(0, 1) for x in drawn[:3]), drawn[3]]


def lists_of(case: Case, q: Tensor, k: Tensor, density: float) -> BlockLists:
    positions = torch.cat([torch.arange(n) for n in case.documents])[None].to(q.device)
    layout = build_layout(1, case.tokens, 64, q.device, None, positions)
    assert list(layout.documents) == case.bounds
    attend = Attend(choice=case.choice, density=density, block=case.block)
    return choose_blocks(build_grid(layout, attend, case.heads[1], case.window), q, k, case.d**-0.5)


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lists: BlockLists, case: Case, rows: Tensor) -> list[Tensor]:
    """(out, dq, dk, dv) in fp32, of the rows' queries, query block by query block."""
    q, k, v, grad = (x.float() for x in (q, k, v, grad))
    (H, K), scale = case.heads, case.d**-0.5
    out, dq, dk, dv = torch.zeros_like(grad), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    device = q.device
    by_head = all_listed(lists)
    block = 0
    for first, end in case.bounds:
        for begin in range(first, end, QUERY_BLOCKS * case.block):
            queries = rows[(rows >= begin) & (rows < min(begin + QUERY_BLOCKS * case.block, end))]
            listed = torch.tensor([head[block] for head in by_head]).expand(K, -1)
            block += 1
            if not len(queries):
                continue
            keys = (listed[..., None] + torch.arange(case.block)).flatten(1)
            seen = (keys[:, None] <= queries[:, None]) & (keys[:, None] < end)
            if case.window is not None:
                seen &= keys[:, None] > queries[:, None] - case.window
            keys, seen = keys.clamp(max=end - 1).to(device), seen.to(device).repeat_interleave(H // K, 0)
            head = torch.arange(K, device=device)[:, None]
            mine = queries.to(device)
            leaves = [x.requires_grad_() for x in (q[:, mine], k[head, keys], v[head, keys])]
            k_H, v_H = (x.repeat_interleave(H // K, 0) for x in leaves[1:])
            scores = (leaves[0] @ k_H.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
            found = (scores.softmax(-1) @ v_H).transpose(0, 1)
            parts = torch.autograd.grad(found, leaves, grad[mine])
            out[mine], dq[:, mine] = found.detach(), parts[0]
            for total, part in zip((dk, dv), parts[1:], strict=True):
                total.index_put_((head.expand_as(keys), keys), part, accumulate=True)
    mine = rows.to(device)
    return [out[mine], dq[:, mine], dk, dv]


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, case: Case, rows: Tensor) -> list[Tensor]:
    """(out, dq, dk, dv) of torch's dense attention in the inputs' precision, with these rows' gradients alone."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = torch.cat(
        [
            F.scaled_dot_product_attention(*(x[None, :, a:b] for x in leaves), is_causal=True, enable_gqa=True)[0]
            for a, b in case.bounds
        ],
        1,
    ).transpose(0, 1)
    mine = rows.to(q.device)
    only = torch.zeros_like(grad)
    only[mine] = grad[mine]
    dq, dk, dv = torch.autograd.grad(out, leaves, only)
    return [out.detach()[mine], dq[:, mine], dk, dv]


def mean_square_root(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def row_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each row of each head, relative to its own norm."""
    size = wanted.norm(dim=-1)
    return (found.float() - wanted).norm(dim=-1) / size.clamp(min=FAINT * float(mean_square_root(size)))


@pytest.mark.parametrize(
    "case", [*SMALL, *(pytest.param(case, marks=pytest.mark.gpu) for case in (*REAL, *LONG))], ids=str
)
def test_errors_are_those_of_torchs_dense_attention(case: Case, device: torch.device) -> None:
    q, k, v, grad = inputs(case, device)
    rows = torch.arange(0, case.tokens, case.every)
    lists = lists_of(case, q, k, case.density)
    if case.choice == "pooled":
        assert len(lists.grid.start) == case.heads[1]
        # Inside a sliding window all heads may choose the one next to their window.
        first, second, *_ = all_listed(lists)
        assert case.window is not None or first != second
    mine = rows.to(device)
    queries = kernels.Queries(lists, None if case.every == 1 else rows)
    scale = case.d**-0.5
    out, lse = kernels.block_sparse_forward(q[:, mine], k, v, queries, scale)
    grads = kernels.block_sparse_backward(grad[mine], q[:, mine], k, v, out, lse, queries, scale)
    wanted = exact(q, k, v, grad, lists, case, rows)
    everything = lists_of(Case(**{**vars(case), "window": None}), q, k, 1.0)
    torchs_wanted = exact(q, k, v, grad, everything, Case(**{**vars(case), "window": None}), rows)
    torchs = dense(q, k, v, grad, case, rows)
    for name, found, right, low, low_right in zip("oqkv", (out, *grads), wanted, torchs, torchs_wanted, strict=True):
        assert found.dtype == q.dtype
        if name in "kv":
            assert not found[right.abs().amax(-1) == 0].any(), "nobody sees these keys"
        errors, torchs_errors = row_errors(found, right), row_errors(low, low_right)
        for statistic, of, factor in (("root mean square", mean_square_root, 1.3), ("largest", Tensor.max, 2.5)):
            mistake, limit = float(of(errors)), factor * float(of(torchs_errors))
            assert mistake <= limit, f"{name}: {statistic} of rows' errors {mistake:.2e} over {limit:.2e}"
