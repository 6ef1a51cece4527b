"""Block masses of some queries against their twin in fp64: odd lengths, groups, head sizes, blocks."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICE, DTYPES, HEADS, poisoned

from lemo.kernels import reference

pytest.importorskip("triton")
from lemo.kernels.masses import block_log_masses

ROWS = {
    "few": torch.tensor([0, 5, 299]),
    "every eighth": torch.arange(3, 301, 8),
    "all": torch.arange(301),
    "the first": torch.zeros(70, dtype=torch.int64),
    "none": torch.arange(0),
}


def check(
    rows: torch.Tensor, heads: str, d: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(301, h, d, generator=generator).to(DEVICE, dtype).transpose(0, 1) for h in HEADS[heads])
    rows = rows.to(DEVICE)
    wanted = reference.block_log_masses(q[:, rows].double(), k.double(), rows, d**-0.5, block)
    poisoned(monkeypatch)
    found = block_log_masses(q[:, rows], k, rows, d**-0.5, block)
    assert found.dtype == torch.float32
    assert found.shape == (HEADS[heads][0], -(-301 // block), len(rows))
    # Products of the inputs are exact; sums are fp32. Infinities must be where the twin has them.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ROWS)
def test_equals_the_twin(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ROWS[which], "grouped", 16, 16, dtype, monkeypatch)


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("d", [8, 40, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_head_size_grouping_and_block(heads: str, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ROWS["every eighth"], heads, d, block, torch.float32, monkeypatch)
