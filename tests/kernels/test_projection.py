"""Norm and linear map of the residual stream against their twin in fp64: norms, odd sizes, rows of a wider tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned

from lemo.kernels import reference
from lemo.selection import score_heads
from lemo.selection.layout import build_layout
from lemo.selection.score_heads import random_heads
from lemo.types import NormWeights

pytest.importorskip("triton")
from lemo.kernels import projection
from lemo.kernels.launching import launch
from lemo.kernels.projection import FirstLook, projected

# N, D, r; columns before and behind the rows' own, not a number.
SIZES = {
    "one row": (1, 16, 1, 0, 0),
    "small": (37, 40, 5, 0, 0),
    "odd": (129, 203, 67, 3, 2),
    "step": (130, 64, 128, 0, 0),
    "two columns' tiles": (200, 192, 256, 64, 0),
    "three": (131, 136, 300, 8, 16),
    "two wide ones": (140, 128, 416, 0, 64),
}
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_twin(size: str, dtype: torch.dtype, centered: bool, monkeypatch: Any) -> None:
    check(SIZES[size], dtype, centered, monkeypatch)


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("r", [384, 512])
def test_equals_the_twin_at_a_models_size(r: int, centered: bool, monkeypatch: Any) -> None:
    """Copies that run ahead of products on the same memory show in long rows only."""
    for dtype in DTYPES if DEVICE == "cuda" else DTYPES[-1:]:
        check((1000 if DEVICE == "cuda" else 130, 4096, r, 0, 0), dtype, centered, monkeypatch)


@pytest.mark.skipif(DEVICE != "cuda", reason="takes 6 GB")
def test_rows_may_lie_beyond_32_bits(monkeypatch: Any) -> None:
    check((45, 256, 256, 0, 2**26 - 256), DTYPES[-1], False, monkeypatch)


def check(size: tuple[int, int, int, int, int], dtype: torch.dtype, centered: bool, monkeypatch: Any) -> None:
    N, D, r, before, behind = size
    generator = torch.Generator().manual_seed(0)
    drawn, matrix, offset = (torch.randn(s, generator=generator) for s in ((N, D), (r, D), (r,)))
    # A residual stream has a mean and a few loud numbers.
    drawn = (3 * drawn + 1).index_fill(1, torch.tensor([1]), 30.0)
    memory = torch.full((N + 2, before + D + behind), float("nan"), device=DEVICE, dtype=dtype)
    hidden = memory[1:-1, before : before + D]
    hidden.copy_(drawn)
    matrix, offset = (matrix / D**0.5).to(DEVICE, dtype), offset.to(DEVICE)
    look = FirstLook(matrix, offset, matrix.float().sum(1) if centered else None, 1e-5)
    wanted = reference.projected(*(x.double() for x in (hidden, matrix, offset)), 1e-5, centered)
    with monkeypatch.context() as unwritten:
        poisoned(unwritten)
        found = projected(hidden, look)
    assert found.dtype == dtype
    atol = 2e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * ROUNDING[dtype], atol=atol)


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "normed heads"])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_score_heads_by_kernel_are_those_of_torch(centered: bool, gain: bool, monkeypatch: Any) -> None:
    """Biases, keys that are shared unevenly, norms of heads; the second time the branch's norm has changed."""
    D, d, T = 48, 16, 200
    torch.manual_seed(0)
    heads = random_heads(3, 2, d, D).to(DEVICE)
    for side in (heads.query, heads.key):
        side.matrix.mul_(0.1)
        side.bias.normal_()
        if gain:
            side.gain = torch.nn.Parameter(torch.rand(len(side.bias), d, device=DEVICE) + 0.5, requires_grad=False)
            side.eps = torch.tensor(1e-5, device=DEVICE)
    heads.forget()
    norm: Any = torch.nn.LayerNorm(D, device=DEVICE) if centered else torch.nn.RMSNorm(D, eps=1e-5, device=DEVICE)
    norm.weight.data.uniform_(0.5, 1.5)
    if centered:
        norm.bias.data.normal_()
    weights = NormWeights(norm.weight.detach(), norm.bias.detach() if centered else None, 1e-5, centered)
    hidden, layout = torch.randn(T, D, device=DEVICE), build_layout(1, T, 16, torch.device(DEVICE))

    def scores(known: NormWeights | None) -> torch.Tensor:
        with torch.no_grad():
            return heads.scores(
                hidden, norm, known, lambda x: x.transpose(0, 1), layout, None, causal=False, mass=False
            )

    calls: list[int] = []

    def counted(*args: Any, **values: Any) -> None:
        calls.append(len(calls))
        launch(*args, **values)

    monkeypatch.setattr(projection, "launch", counted)
    for turn in (1, 2):
        with monkeypatch.context() as plain:
            plain.setattr(score_heads, "projection_backend", lambda *_: "torch")
            wanted = scores(None)
        with monkeypatch.context() as by_kernel:
            by_kernel.setattr(score_heads, "projection_backend", lambda *_: "triton")
            found = scores(weights)
        assert len(calls) == turn
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        weights.weight.mul_(1.5)
