"""Movement of rows against its twin in fp64: values, every gradient, odd widths, rows that nobody may touch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned

from lemo.kernels import reference

pytest.importorskip("triton")
from lemo.kernels import movement

# Half of a unit in the last place, and what sums of D numbers lose in fp32.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
T = 83
ROWS = {
    "blocks": torch.arange(T)[(torch.arange(T) // 8) % 2 == 1],
    "one": torch.tensor([T - 1]),
    "all": torch.arange(T),
    "none": torch.arange(0),
    "scattered": torch.tensor([0, 3, 4, 11, 57, 81, 82]),
}
# One number, less than a tile, a power of two, one more than that, several tiles' worth.
WIDTHS = (1, 24, 64, 129, 4100)
KINDS = {"rms": False, "layer": True}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def stream(D: int, dtype: torch.dtype, rows: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
    """T rows, of which those not named are NaN; with `wide` between other columns, which are NaN too."""
    x = draw(T, D, dtype=dtype)
    outside = torch.ones(T, dtype=torch.bool)
    outside[rows] = False
    x[outside.to(DEVICE)] = float("nan")
    if not wide:
        return x
    holder = torch.full((T, D + 7), float("nan"), device=DEVICE, dtype=dtype)
    holder[:, :D] = x
    return holder[:, :D]


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=2 * ROUNDING[dtype], atol=4e-6 * max(size, 1e-3))


def untouched(x: torch.Tensor, before: torch.Tensor, rows: torch.Tensor) -> None:
    outside = torch.ones(len(x), dtype=torch.bool)
    outside[rows] = False
    outside = outside.to(DEVICE)
    assert torch.equal(x[outside].isnan(), before[outside].isnan())
    assert torch.equal(x[outside].nan_to_num(), before[outside].nan_to_num())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("D", WIDTHS)
def test_rows_are_gathered_and_added_to_in_place(name, D, monkeypatch):
    rows = ROWS[name].to(DEVICE)
    for dtype, other, wide in product(DTYPES, DTYPES, (False, True)):
        x = stream(D, dtype, ROWS[name], wide=wide)
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = movement.gather_rows(x, rows, other)
        assert torch.equal(found, x[rows].to(other))
        before, y = x.clone(), draw(len(rows), D, dtype=other, seed=1)
        movement.add_rows_(x, rows, y)
        assert torch.equal(x[rows], (before[rows].float() + y.float()).to(dtype))
        untouched(x, before, ROWS[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_rows_and_its_gradients(dtype, name, D, kind, monkeypatch):
    rows, centered = ROWS[name].to(DEVICE), KINDS[kind]
    x = stream(D, dtype, ROWS[name], wide=True)
    weight, bias = 1 + 0.3 * draw(D, dtype=dtype, seed=2), draw(D, dtype=dtype, seed=3) if centered else None
    grad_y = draw(len(rows), D, dtype=dtype, seed=4)
    grad = stream(D, dtype, ROWS[name])
    # In fp64 by autograd of plain torch, not by the twin's formulas.
    leaves = [t.double().requires_grad_() for t in (x[rows], weight)]
    leaves += [] if bias is None else [bias.double().requires_grad_()]
    if centered:
        wanted = torch.nn.functional.layer_norm(leaves[0], (D,), leaves[1], leaves[2], 1e-3)
    else:
        wanted = torch.nn.functional.rms_norm(leaves[0], (D,), leaves[1], 1e-3)
    of_rows, *of_parameters = torch.autograd.grad(wanted, leaves, grad_y.double())
    for run in (movement, reference):
        mine, before = grad.clone(), grad.clone()
        with monkeypatch.context() as patch:
            poisoned(patch)
            y, kept = run.gather_norm(x, rows, weight, bias, 1e-3, centered=centered, dtype=dtype, keep_rows=True)
            assert kept is not None
            sums = run.add_norm_gradient_(mine, rows, grad_y, kept, weight, 1e-3, centered=centered, parameters=True)
        assert torch.equal(kept, x[rows])
        close(y, wanted.detach(), dtype)
        close(mine[rows], of_rows + before[rows].double(), dtype)
        untouched(mine, before, ROWS[name])
        for found, right in zip(sums, of_parameters, strict=False):
            assert found is not None
            torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
        alone = grad.clone()
        assert run.add_norm_gradient_(alone, rows, grad_y, kept, weight, 1e-3, centered=centered) == (None, None)
        # Another kernel, whose sums may go another way.
        torch.testing.assert_close(alone, mine, rtol=4 * ROUNDING[dtype], atol=1e-5, equal_nan=True)
        again, nothing = run.gather_norm(kept, None, weight, bias, 1e-3, centered=centered, dtype=dtype)
        assert nothing is None
        torch.testing.assert_close(again, y, rtol=4 * ROUNDING[dtype], atol=1e-5)


def test_dtypes_may_differ():
    """A stream in fp32 under autocast: its norm and the branch are in half precision."""
    rows = ROWS["blocks"].to(DEVICE)
    x, weight = draw(T, 40, dtype=torch.float32), draw(40, dtype=torch.bfloat16, seed=1)
    y, kept = movement.gather_norm(
        x, rows, weight, None, 1e-5, centered=False, dtype=torch.float16, keep_rows=True
    )  # fmt: skip
    assert kept is not None
    assert (y.dtype, kept.dtype) == (torch.float16, torch.float32)
    wanted, _ = reference.gather_norm(x, rows, weight, None, 1e-5, centered=False, dtype=torch.float64)
    close(y, wanted, torch.float16)
    grad, grad_y = (draw(n, 40, dtype=d, seed=5) for n, d in ((T, torch.float32), (len(rows), torch.float16)))
    twin = grad.clone()
    movement.add_norm_gradient_(grad, rows, grad_y, kept, weight, 1e-5, centered=False)
    reference.add_norm_gradient_(twin, rows, grad_y, kept, weight, 1e-5, centered=False)
    torch.testing.assert_close(grad, twin, rtol=1e-5, atol=1e-5)


def test_many_tiles_share_the_sums_of_a_trained_norm(monkeypatch):
    """More tiles than programs that sum."""
    monkeypatch.setattr(movement, "_SUMMING", 3)
    x, grad_y, weight = (
        draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(((90, 4096), (90, 4096), (4096,)))
    )
    found = movement.add_norm_gradient_(None, None, grad_y, x, weight, 1e-5, centered=True, parameters=True)
    twin = reference.add_norm_gradient_(None, None, grad_y, x, weight, 1e-5, centered=True, parameters=True)
    for mine, right in zip(found, twin, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    again = movement.add_norm_gradient_(None, None, grad_y, x, weight, 1e-5, centered=True, parameters=True)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
