"""How an average keep is shared out: averages hold, cheap branches give, expensive ones keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch

from lemo.calibration.allocation import LEAST, algorithm1, by_curves, threshold_of, with_average

Key = tuple[int, str]
UNITS: list[Key] = [(layer, branch) for layer in range(3) for branch in ("attention", "mlp")]


def mean(shares: Mapping[Key, float]) -> float:
    return sum(shares.values()) / len(shares)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.73, 1.0])
def test_thresholds_keep_the_share(keep: float) -> None:
    score = torch.rand(200, generator=torch.Generator().manual_seed(0))
    edge = torch.zeros(200, dtype=torch.bool)
    edge[[0, 99, 100, 199]] = True
    tokens = torch.full((200,), 16)
    tokens[[99, 199]] = 5
    threshold = threshold_of(score, edge, tokens, keep)
    kept = float(tokens[(score >= threshold) | edge].sum() / tokens.sum())
    assert keep - 1e-9 <= kept <= keep + 16 / float(tokens.sum()) + 1e-9
    assert (threshold == 0.0) == (keep == 1.0)


def test_a_threshold_of_a_share_that_the_edges_fill() -> None:
    score, edge = torch.arange(1.0, 5), torch.tensor([True, False, False, True])
    threshold = threshold_of(score, edge, torch.full((4,), 8), 0.1)
    assert int(((score >= threshold) | edge).sum()) == 3, "the best block beside the edges stays: nearest from above"


COSTS = {
    (0, "attention"): {0.75: 0.001, 0.5: 0.002, 0.25: 0.01},
    (0, "mlp"): {0.75: 0.5, 0.5: 1.0, 0.25: 2.0},
    # Not convex: the first step alone looks dear.
    (1, "attention"): {0.75: 0.004, 0.5: 0.0044, 0.25: 0.005},
    (1, "mlp"): {0.75: -0.001, 0.5: 0.003, 0.25: 0.2},
}


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.6, 0.4])
def test_curves_reach_the_average_and_no_grid_does_better(keep: float) -> None:
    shares = by_curves(COSTS, keep)
    assert mean(shares) == pytest.approx(keep)
    assert all(0.25 <= share <= 1 for share in shares.values())

    def cost(unit: Key, share: float) -> float:
        points = [(1.0, 0.0), *sorted(((k, max(0.0, c)) for k, c in COSTS[unit].items()), reverse=True)]
        best = math.inf
        # The hull: a share between two levels costs what lies on the line between them.
        for (a, x), (b, y) in itertools.combinations(points, 2):
            if b <= share <= a:
                best = min(best, x + (y - x) * (a - share) / (a - b))
        return best

    total = sum(cost(unit, share) for unit, share in shares.items())
    for levels in itertools.product((1.0, 0.75, 0.5, 0.25), repeat=len(COSTS)):
        if sum(levels) / len(levels) <= keep + 1e-9:
            assert total <= sum(cost(u, k) for u, k in zip(COSTS, levels, strict=True)) + 1e-9


def test_expensive_branches_stay_dense() -> None:
    assert by_curves(COSTS, 0.75)[0, "mlp"] == 1.0


def test_an_average_is_restored_within_bounds() -> None:
    shares = with_average({unit: 0.1 * i for i, unit in enumerate(UNITS)}, 0.6)
    assert mean(shares) == pytest.approx(0.6, abs=1e-6)
    assert all(LEAST <= share <= 1 for share in shares.values())
    assert list(shares.values()) == sorted(shares.values())


def test_algorithm1_moves_keep_to_where_it_is_missed() -> None:
    weight = {unit: 4.0 if unit[1] == "mlp" else 0.1 for unit in UNITS}

    def losses(shares: Mapping[Key, float]) -> list[float]:
        loss = sum(weight[unit] * (1 - share) ** 2 for unit, share in shares.items())
        # Each sequence has its own level, which cancels in differences.
        return [5.0 + loss, 1.0 + 1.1 * loss, 2.0 + 0.9 * loss]

    even = dict.fromkeys(UNITS, 0.7)
    found = algorithm1(even, 0.7, losses)
    assert mean(found) == pytest.approx(0.7, abs=1e-6)
    assert sum(losses(found)) < sum(losses(even))
    assert min(found[u] for u in UNITS if u[1] == "mlp") > max(found[u] for u in UNITS if u[1] == "attention")


def test_algorithm1_returns_the_best_it_saw() -> None:
    """Where any change harms, what it began with stays."""

    def losses(shares: Mapping[Key, float]) -> list[float]:
        return [sum((share - 0.7) ** 2 for share in shares.values())] * 2

    found = algorithm1(dict.fromkeys(UNITS, 0.7), 0.7, losses)
    assert all(share == pytest.approx(0.7, abs=1e-6) for share in found.values())
