"""Which documents choose score heads: those with blocks to choose among, or the last one if no other."""

from __future__ import annotations

import pytest
import torch

import lemo
from lemo.calibration.config import CalibrationConfig
from lemo.calibration.fitting import Fitted, fit
from tiny import VOCAB, build


def fitted(lengths: list[int], **values: object) -> Fitted:
    """Of attention in a tiny model, by documents of random tokens."""
    model = build("llama", lora=False).eval()
    keep = lemo.config.BranchSelection(threshold=0.0)
    lemo.sparsify(model, lemo.SparsityConfig(mode="forward", block_size=8, attention=keep, mlp=keep))
    # Of one length the same.
    sequences = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    predictor = {"rank": 24, "head_steps": 4, **values}
    config = CalibrationConfig(
        data={"max_tokens": 128}, block_size=8, branches="attention", bypass_rank=0, predictor=predictor
    )
    return fit(model, sequences, len(sequences), config, lambda _: None)


def counts(found: Fitted) -> list[int]:
    return [found.predictors[layer, "attention"].count for layer in range(len(found.predictors))]


@pytest.mark.parametrize("short", [[1], [7, 20, 9], [3] * 6])
def test_short_documents_choose_no_heads(short: list[int]) -> None:
    """As if the long ones alone had been there when heads were chosen."""
    long = [120, 100, 110, 128, 90]
    found, wanted = fitted(short + long, head_steps=0), fitted(long, head_steps=0)
    assert counts(found) != [1] * len(counts(found))
    for key, one in wanted.predictors.items():
        assert torch.equal(found.predictors[key].key_of, one.key_of)


@pytest.mark.parametrize("size", [0.65, 1.0])
@pytest.mark.parametrize("lengths", [[20], [5, 12], [128], [9, 128, 3]])
def test_few_documents_are_enough(lengths: list[int], size: float) -> None:
    found = fitted(lengths, size=size)
    assert all(1 <= count <= 4 for count in counts(found))
    numbers = sum(one.size for one in found.predictors.values())
    assert numbers <= size * sum(found.first_size.values()) or counts(found) == [1] * len(counts(found))
    for one in found.predictors.values():
        assert all(p.isfinite().all() for p in one.parameters())
