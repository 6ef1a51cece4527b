"""Systematic sampling: probabilities, counts, and estimates without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lemo.config import Attend
from lemo.selection import attend as selection
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout
from lemo.selection.sampling import draw_systematically, inclusion_probabilities
from lemo.sparse.attend import attend_lists


def test_probabilities_are_in_proportion_but_for_what_is_certain() -> None:
    weight = torch.tensor([[8.0, 1.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 0.0, 0.0, 0.0]])
    found = inclusion_probabilities(weight, torch.tensor([2, 4, 2]))
    wanted = torch.tensor([[1.0, 0.25, 0.0, 0.25, 0.5], [0.8] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("count", [0, 1, 7, 39])
def test_as_many_as_asked_none_twice_and_each_as_often_as_its_probability(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(40, generator=generator).pow(4)
    weight[[0, 13, 39]] = 0.0
    count = min(count, 37)
    probability = inclusion_probabilities(weight, torch.tensor(count)).expand(4000, -1)
    assert float(probability[0].double().sum()) == pytest.approx(count, rel=1e-6)
    found = draw_systematically(probability, count, torch.rand(4000, 1, generator=generator, dtype=torch.float64))
    assert found.shape == (4000, count)
    assert (found.diff(dim=1) > 0).all(), "ascending, none twice"
    often = torch.zeros(40).index_add_(0, found.flatten(), torch.ones(found.numel())) / 4000
    assert not often[weight == 0].any()
    # Five standard deviations of a share.
    assert ((often - probability[0]).abs() <= 5 * (probability[0] * (1 - probability[0]) / 4000).sqrt() + 1e-6).all()


def sums(choice: str, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(numerators and denominators of the softmax by lists, mean over draws; those of dense attention)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 256, 8, generator=generator) for h in (4, 2, 2))
    layout = build_layout(1, 256, 8, torch.device("cpu"))
    grid = build_grid(layout, Attend(density=0.4, choice=choice, block=8), 2, None)  # type: ignore[arg-type]
    rows, found = torch.arange(256), []
    scores = (q @ k.repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5).exp()
    ones = torch.cat([v.repeat_interleave(2, 0), torch.ones(4, 256, 1)], 2)
    for seed in range(draws):
        lists = choose_blocks(grid, q, k, 8**-0.5, lambda: seed)  # noqa: B023
        weight = lists.bias(rows, 0, 256).exp()
        found.append((scores * weight.repeat_interleave(2, 0)) @ ones)
    return torch.stack(found).mean(0), (scores * torch.ones(256, 256).tril()) @ ones


def error(choice: str, draws: int) -> float:
    found, wanted = sums(choice, draws)
    return float((found - wanted).norm() / wanted.norm())


def test_sampled_blocks_estimate_dense_attention_without_bias() -> None:
    """The error of a mean over draws falls with the root of their number; that of blocks without weights doesn't."""
    assert error("sampled", 800) < 0.3 * error("sampled", 50) < 0.3 * error("random", 50)
    assert error("random", 400) > 0.9 * error("random", 50)


def test_likely_blocks_are_drawn_more_often() -> None:
    """Where most queries look for keys of one block, that block is nearly always there, with a weight of nearly 1."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 512, 8, generator=generator) for _ in range(2))
    q[..., 0] += 3.0
    k[:, 80:88, 0] += 6.0
    layout = build_layout(1, 512, 8, torch.device("cpu"))
    grid = build_grid(layout, Attend(density=0.2, choice="sampled", block=8, look=0.125), 2, None)
    choosers = grid.choosers[0]
    late = choosers.block * 16 - choosers.nearest * 8 > 88
    hits, boosts = [], []
    for seed in range(20):
        lists = choose_blocks(grid, q, k, 8**-0.5, lambda: seed)  # noqa: B023
        assert lists.boost is not None
        entries = lists.entries.view(2, -1, choosers.chosen)[:, late]
        here = entries == 80
        hits.append(here.any(-1).float().mean())
        boosts.append(lists.boost.view(2, -1, choosers.chosen)[:, late][here])
        assert not lists.boost.view(2, -1, choosers.chosen)[..., 0].any(), "the first block is certain"
    assert float(torch.stack(hits).mean()) > 0.95
    assert float(torch.cat(boosts).mean()) < 0.1
    assert attend_lists(q, k, k, lists, None, 1.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_where_all_masses_underflow_blocks_are_drawn_evenly(dtype: torch.dtype) -> None:
    """Of a head that looks at the first block alone, distant blocks' masses are 0, and 0 / 0 would be the loss."""
    q, k = (torch.zeros(2, 512, 8, dtype=dtype) for _ in range(2))
    q[..., 0], k[..., 0], k[:, :8, 0] = 30.0, -30.0, 30.0
    layout = build_layout(1, 512, 8, torch.device("cpu"))
    grid = build_grid(layout, Attend(density=0.2, choice="sampled", block=8, look=0.125), 2, None)
    lists = choose_blocks(grid, q, k, 8**-0.5, lambda: 0)
    choosers = grid.choosers[0]
    assert lists.boost is not None
    others = torch.from_numpy(choosers.block * 2 - choosers.nearest - 1)
    wanted = (others / (choosers.chosen - 1)).log2().expand(2, -1)
    boost = lists.boost.view(2, -1, choosers.chosen)
    torch.testing.assert_close(boost[..., 1:], wanted[..., None].float().expand_as(boost[..., 1:]))
    assert attend_lists(q, k, k, lists, None, 8**-0.5).isfinite().all()


def test_plain_torch_holds_no_more_scores_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forms the scores of every key, the kernel those of every key block."""
    most, held, real = 2**16, [], selection.looked_mass

    def watched(q: torch.Tensor, k: torch.Tensor, block: torch.Tensor, *rest: Any) -> torch.Tensor:
        held.append(q.shape[0] * len(block) * rest[-1] * k.shape[1])
        return real(q, k, block, *rest)

    monkeypatch.setattr(selection, "looked_mass", watched)
    monkeypatch.setattr(selection, "_SCORES_AT_ONCE", most)
    q, k = (torch.randn(h, 512, 8) for h in (4, 2))
    layout = build_layout(1, 512, 16, torch.device("cpu"))
    grid = build_grid(layout, Attend(density=0.3, choice="sampled", block=16), 2, None)
    assert choose_blocks(grid, q, k, 8**-0.5, lambda: 0).entries.numel() == 2 * grid.grid.chosen.sum()
    assert len(held) > 1
    assert max(held) <= most
