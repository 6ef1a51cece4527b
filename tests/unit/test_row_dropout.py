"""The counter-based dropout: right rate, independent of how rows are asked for, and what torch's modules see of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lemo.sparse.dropout import RowDropout, attention_with_dropout, dropout_mask


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate(p):
    mask = dropout_mask(seed=3, site=1, rows=torch.arange(2000), columns=500, p=p)
    # Five standard deviations of a million draws; rows and columns apart, to see a pattern.
    assert abs(float(mask.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert float(mask.float().mean(0).sub(1 - p).abs().max()) < 6 * (p * (1 - p) / 2000) ** 0.5
    assert float(mask.float().mean(1).sub(1 - p).abs().max()) < 6 * (p * (1 - p) / 500) ** 0.5


def test_neighbours_are_uncorrelated():
    mask = dropout_mask(seed=0, site=0, rows=torch.arange(1000), columns=1000, p=0.5).float() - 0.5
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1)), mask.T):
        assert abs(float((mask * shifted).mean()) / 0.25) < 5 / 1000
    other = dropout_mask(seed=0, site=1, rows=torch.arange(1000), columns=1000, p=0.5).float() - 0.5
    assert abs(float((mask * other).mean()) / 0.25) < 5 / 1000


def test_any_rows_in_any_order_see_the_same_mask():
    whole = dropout_mask(7, 2, torch.arange(100), 33, 0.3)
    some = torch.tensor([71, 3, 99, 0])
    assert torch.equal(dropout_mask(7, 2, some, 33, 0.3), whole[some])


def test_rows_past_32_bits_differ():
    low = torch.arange(50)
    assert not torch.equal(dropout_mask(0, 0, low, 64, 0.5), dropout_mask(0, 0, low + 2**32, 64, 0.5))


def test_functional_dropout_inside_the_context():
    x = torch.ones(1, 6, 40)
    with RowDropout(5) as dropout:
        first, second = F.dropout(x, 0.25), F.dropout(x, 0.25)
        with dropout.on(torch.tensor([4, 1]), site=0):
            again = F.dropout(x[0, :2], 0.25)
        assert torch.equal(F.dropout(x, 0.25, training=False), x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert not torch.equal(first, second)
    assert torch.equal(again, first[0, [4, 1]])


def test_scaled_dot_product_attention_and_its_rows_agree():
    torch.manual_seed(0)
    B, H, K, T, d, p = 2, 4, 2, 300, 8, 0.2
    q, k, v = torch.randn(B, H, T, d), torch.randn(B, K, T, d), torch.randn(B, K, T, d)
    with RowDropout(11):
        dense = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=True)
    rows = torch.tensor([5, 120, 299])
    for b in range(B):
        some = attention_with_dropout(
            q[b][:, rows],
            k[b].repeat_interleave(2, 0),
            v[b].repeat_interleave(2, 0),
            torch.arange(T)[None] <= rows[:, None],
            d**-0.5,
            seed=11,
            site=0,
            first_head_rows=b * H * T + rows,
            rows_per_head=T,
            p=p,
        )
        torch.testing.assert_close(some, dense[b][:, rows], rtol=1e-5, atol=1e-6)


def test_attention_dropout_averages_to_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 16, 4), torch.randn(1, 2, 16, 4), torch.randn(1, 2, 16, 4)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    draws = []
    for seed in range(2000):
        with RowDropout(seed):
            draws.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True))
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - plain).abs() / (stacked.std(0) / 2000**0.5).clamp(min=1e-6)
    assert float(error.mean()) < 1.1  # mean of |z| is 0.8
