"""Block masses of some queries against their twin in fp64: odd lengths, windows, groups, head sizes, blocks."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICE, DTYPES, HEADS, poisoned

from lemo.kernels import reference

pytest.importorskip("triton")
from lemo.kernels.masses import block_masses

T = 301
# Rows of queries, how many are looked at in each query block, and the first key that each sees.
ROWS = {
    "one a block": (torch.tensor([0, 5, 299]), 1, torch.zeros(3, dtype=torch.int64)),
    "every second": (torch.arange(2, 301, 2)[:144], 16, torch.zeros(144, dtype=torch.int64)),
    "a window": (torch.arange(8, 296), 4, (torch.arange(8, 296) // 4 * 4 - 40).clamp(min=0) // 16 * 16),
    "a wide window": (torch.arange(200, 264), 4, torch.arange(200, 264) // 4 * 4 - 120),
    "the last, again and again": (torch.full((64,), 300), 32, torch.zeros(64, dtype=torch.int64)),
    "none": (torch.arange(0), 8, torch.arange(0)),
}


def check(which: str, heads: str, d: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, looked, lowest = ROWS[which]
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(T, h, d, generator=generator).to(DEVICE, dtype).transpose(0, 1) for h in HEADS[heads])
    rows, lowest = rows.to(DEVICE), lowest.to(DEVICE)
    wanted = reference.block_masses(q[:, rows].double(), k.double(), lowest, rows, d**-0.5, block, looked)
    poisoned(monkeypatch)
    found = block_masses(q[:, rows], k, lowest, rows, d**-0.5, block, looked)
    assert found.dtype == torch.float32
    assert found.shape == (HEADS[heads][1], len(rows) // looked, -(-T // block))
    # Products of the inputs are exact; sums are fp32.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-8)
    if len(rows):
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ROWS)
def test_equals_the_twin(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(which, "grouped", 16, 16, dtype, monkeypatch)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("d", [8, 40, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_head_size_grouping_and_block(heads: str, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check("every second", heads, d, block, torch.float32, monkeypatch)
