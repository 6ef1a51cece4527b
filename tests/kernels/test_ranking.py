"""Kept rows by a kernel against what torch makes: ties, numbers that aren't, packed and padded documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import DEVICE

from lemo.kernels import dispatch
from lemo.selection.layout import build_layout
from lemo.selection.ranking import plan_from_blocks, plan_of_marked
from lemo.selection.top import plan_of_top
from lemo.types import SequenceLayout

pytest.importorskip("triton")

LENGTHS = {"one": [640], "a short block": [325], "packed": [16, 3, 130, 4, 77, 64], "one block": [7], "long": [9000]}


def layout_of(lengths: list[int], block: int) -> SequenceLayout:
    """Documents of these lengths, packed."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return build_layout(1, sum(lengths), block, torch.device(DEVICE), position_ids=positions)


def padded(block: int) -> SequenceLayout:
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[0, :21] = 0
    mask[2, 33:] = 0
    return build_layout(3, 60, block, torch.device(DEVICE), mask)


def check_rows(layout: SequenceLayout, score: torch.Tensor, keep: float, monkeypatch: Any) -> None:
    monkeypatch.setenv("LEMO_KERNELS", "torch")
    wanted = plan_of_top(score, layout, keep)
    monkeypatch.setenv("LEMO_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "_reason_against_any", lambda x: None)
    found = plan_of_top(score, layout, keep)
    assert torch.equal(found.rows, wanted.rows)
    assert (found.cu_seqlens, found.keep) == (wanted.cu_seqlens, wanted.keep)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("block", [4, 13])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_are_those_of_torch(lengths: str, block: int, keep: float, monkeypatch: Any) -> None:
    layout = layout_of(LENGTHS[lengths], block)
    blocks = len(layout.block_tokens)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38], device=DEVICE)
    scores = [
        torch.randn(blocks, device=DEVICE),
        torch.randint(-2, 3, (blocks,), device=DEVICE).float(),
        odd[torch.randint(len(odd), (blocks,), device=DEVICE)],
        torch.full((blocks,), torch.nan, device=DEVICE),
        torch.zeros(blocks, device=DEVICE),
    ]
    for score in scores:
        check_rows(layout, score, keep, monkeypatch)


def test_rows_of_padded_sequences(monkeypatch: Any) -> None:
    layout = padded(8)
    for _ in range(5):
        check_rows(layout, torch.rand(len(layout.block_tokens), device=DEVICE), 0.4, monkeypatch)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("lengths", [*LENGTHS, "padded"])
def test_marked_blocks_give_the_plan_that_the_host_makes(lengths: str, share: float) -> None:
    layout = padded(4) if lengths == "padded" else layout_of(LENGTHS[lengths], 16)
    kept = (torch.rand(len(layout.block_tokens), device=DEVICE) < share) | layout.edge_block
    got, want = plan_of_marked(kept, layout), plan_from_blocks(kept, layout)
    torch.testing.assert_close(got.rows, want.rows, rtol=0, atol=0)
    assert (got.cu_seqlens, got.keep) == (want.cu_seqlens, want.keep)
    torch.testing.assert_close(got.host_rows, want.host_rows, rtol=0, atol=0)
