"""The bypass's fit: the best map of its rank, from sums alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lemo.sparse.bypass import BypassFit


def sample(rows: int = 4000, width: int = 12, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs of unequal, correlated coordinates, and a linear map of them with a bias and noise."""
    x = torch.randn(rows, width, dtype=torch.float64) * torch.linspace(0.2, 3, width) + 1.5
    x = x @ torch.randn(width, width, dtype=torch.float64) / width**0.5
    y = x @ torch.randn(width, width, dtype=torch.float64) + torch.randn(width)
    return x, y + noise * torch.randn(rows, width)


def solved(x: Tensor, y: Tensor, rank: int, parts: int = 3) -> tuple[Tensor, float]:
    """The map's error on the sample, and the share of variance it says it explains."""
    fit = BypassFit(x.shape[1], "cpu")
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        fit.add(a, b)
    bypass, explained = fit.solve(rank, ridge=1e-9)
    assert bypass.a.shape == (rank, x.shape[1])
    return (y - bypass(x)).square().sum(), explained


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_no_map_of_the_rank_is_nearer(rank: int) -> None:
    x, y = sample()
    error, explained = solved(x, y, rank)
    # Eckart-Young: the least-squares fit's outputs, cut to their leading singular vectors.
    x0, y0 = x - x.mean(0), y - y.mean(0)
    outputs = x0 @ torch.linalg.lstsq(x0, y0).solution
    u, s, v = torch.linalg.svd(outputs, full_matrices=False)
    best = (y0 - u[:, :rank] * s[:rank] @ v[:rank]).square().sum()
    assert float(error) == pytest.approx(float(best), rel=1e-4)
    assert explained == pytest.approx(float(1 - best / y0.square().sum()), abs=1e-4)


def test_constant_outputs_and_inputs_of_few_directions() -> None:
    x = torch.randn(50, 6) * torch.tensor([1.0, 1, 0, 0, 0, 0])
    fit = BypassFit(6, "cpu")
    fit.add(x, torch.full((50, 6), 2.5))
    bypass, explained = fit.solve(2)
    torch.testing.assert_close(bypass(x), torch.full((50, 6), 2.5), rtol=1e-5, atol=1e-5)
    assert explained == pytest.approx(1.0, abs=1e-6)


def test_dtype_of_the_rows() -> None:
    x, y = sample(200)
    fit = BypassFit(12, "cpu")
    fit.add(x.to(torch.bfloat16), y.to(torch.bfloat16))
    bypass, _ = fit.solve(4)
    assert bypass.a.dtype == torch.float32
    assert bypass(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_too_little_to_fit() -> None:
    fit = BypassFit(6, "cpu")
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit.solve(2)
    fit.add(torch.randn(5, 6), torch.randn(5, 6))
    for rank in (0, 7):
        with pytest.raises(ValueError, match=r"rank must lie in 1 \.\.\. 6"):
            fit.solve(rank)
