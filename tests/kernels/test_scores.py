"""Block-pair scores against their twin in fp64: odd lengths, windows, groups, head sizes, blocks."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICE, DTYPES, HEADS, poisoned

from lemo.kernels import reference

pytest.importorskip("triton")
from lemo.kernels import scores
from lemo.kernels.scores import block_pair_scores

CASES = {
    "one block": (9, 16, None),
    "odd length": (301, 16, None),
    "blocks of 64": (333, 64, None),
    "a block a square": (400, 128, None),
    "window": (333, 32, 50),
    "narrow window": (300, 16, 1),
    "window of a square": (520, 64, 128),
    "wide window": (200, 16, 1000),
}


def draw(T, heads, d, dtype):
    generator = torch.Generator().manual_seed(0)
    # Strides of a projection seen by heads.
    return [torch.randn(T, h, d, generator=generator).to(DEVICE, dtype).transpose(0, 1) for h in heads]


def check(case, heads, d, dtype, monkeypatch, mass=False, sampled=False):
    T, block_size, window = case
    q, k = draw(T, heads, d, dtype)
    wanted = reference.block_pair_scores(q.double(), k.double(), d**-0.5, block_size, window, mass, sampled=sampled)
    poisoned(monkeypatch)
    found = block_pair_scores(q, k, d**-0.5, block_size, window, mass, sampled=sampled)
    assert found.dtype == torch.float32
    # Products of the inputs are exact; sums are fp32.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    assert not found.triu(1).any()
    return found


@pytest.mark.parametrize("mass", [False, True], ids=["largest", "mass"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_twin(case, dtype, mass, monkeypatch):
    check(CASES[case], HEADS["grouped"], 16, dtype, monkeypatch, mass)


@pytest.mark.parametrize("mass", [False, True], ids=["largest", "mass"])
@pytest.mark.parametrize("d", [8, 40, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_head_size_and_grouping(heads, d, mass, monkeypatch):
    check(CASES["odd length"], HEADS[heads], d, torch.float32, monkeypatch, mass)


def test_a_rows_mass_sums_to_one_even_where_scores_are_large():
    q, k = (8 * x for x in draw(300, HEADS["grouped"], 16, torch.float32))
    mass = block_pair_scores(q, k, 1.0, 16, None, mass=True)
    # Scores of some thousand, whose last bit in fp32 is 1e-4: that is what an exponent may be off by.
    torch.testing.assert_close(mass.sum(1), torch.ones_like(mass[0]), rtol=1e-3, atol=0)


def test_negative_products_count_for_nothing():
    q = torch.ones(1, 40, 16, device=DEVICE)
    assert not block_pair_scores(q, -q, 1.0, 16, None).any()


def test_sampled_equals_the_twin(monkeypatch):
    # 36 strips: every one, every second, every fourth.
    found = check((4501, 64, None), (1, 1), 16, torch.float32, monkeypatch, sampled=True)
    looked_at = found[::2, ::2] > 0
    assert looked_at[:, 0].nonzero().flatten().tolist() == [*range(16), *range(16, 32, 2), 32]
    assert looked_at[:, 1].nonzero().flatten().tolist() == [*range(1, 32), 32, 34]


SAMPLED = {
    "blocks of 16": (901, 16, None),
    "blocks of 64": (769, 64, None),
    "a block a square": (1024, 128, None),
    "window": (895, 32, 500),
    "one square": (100, 16, None),
}


def sample_soon(monkeypatch, near, most):
    for module in (reference, scores):
        monkeypatch.setattr(module, "NEAR_STRIPS", near)
        monkeypatch.setattr(module, "MOST_STRIDE", most)


@pytest.mark.parametrize(("near", "most"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_equals_the_twin_at_every_stride(case, near, most, monkeypatch):
    sample_soon(monkeypatch, near, most)
    check(SAMPLED[case], HEADS["one"], 16, torch.float16, monkeypatch, sampled=True)


@pytest.mark.parametrize("d", [16, 40, 128])
@pytest.mark.parametrize("heads", [*HEADS.values(), (1, 1)], ids=str)
@pytest.mark.parametrize("case", [(700, 64, None), (600, 128, 300)], ids=["blocks of 64", "window, a block a square"])
def test_sampled_of_any_head_size_and_grouping(case, heads, d, monkeypatch):
    # Of the larger ones queries come with each head's keys, else they stay.
    sample_soon(monkeypatch, 1, 4)
    check(case, heads, d, torch.float32, monkeypatch, sampled=True)
