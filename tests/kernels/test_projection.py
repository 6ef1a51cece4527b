"""Norm and linear map of the residual stream against their twin in fp64: norms, odd sizes, rows of a wider tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned

from lemo.kernels import reference
from lemo.selection import score_heads
from lemo.selection.layout import build_layout
from lemo.selection.score_heads import HeadProjection, random_heads
from lemo.types import NormWeights

pytest.importorskip("triton")
from lemo.kernels import projection
from lemo.kernels.launching import launch
from lemo.kernels.projection import FirstLook, HeadNorm, projected

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
# Head size and number of heads: within a tile, beyond one, an odd number of tiles, wide ones, the last not full.
NORMED = [(16, 1), (16, 3), (16, 26), (64, 5), (64, 7), (64, 8), (128, 1), (128, 3), (128, 4)]
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


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head", "count"), NORMED)
def test_norms_of_heads_equal_the_twins(
    head: int, count: int, dtype: torch.dtype, centered: bool, monkeypatch: Any
) -> None:
    check((131, 136, head * count, 8, 16), dtype, centered, monkeypatch, head)


@pytest.mark.parametrize(("head", "count"), [(64, 6), (128, 2), (128, 3)])
def test_norms_of_heads_equal_the_twins_at_a_models_size(head: int, count: int, monkeypatch: Any) -> None:
    for dtype in DTYPES if DEVICE == "cuda" else DTYPES[-1:]:
        check((1000 if DEVICE == "cuda" else 130, 4096, head * count, 0, 0), dtype, False, monkeypatch, head)


@pytest.mark.skipif(DEVICE != "cuda", reason="takes 6 GB")
def test_rows_may_lie_beyond_32_bits(monkeypatch: Any) -> None:
    check((45, 256, 256, 0, 2**26 - 256), DTYPES[-1], False, monkeypatch)


def check(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, centered: bool, monkeypatch: Any, head: int | None = None
) -> None:
    N, D, r, before, behind = size
    generator = torch.Generator().manual_seed(0)
    drawn, matrix, offset, gain = (torch.randn(s, generator=generator) for s in ((N, D), (r, D), (r,), (r,)))
    # A residual stream has a mean and a few loud numbers.
    drawn = (3 * drawn + 1).index_fill(1, torch.tensor([1]), 30.0)
    memory = torch.full((N + 2, before + D + behind), float("nan"), device=DEVICE, dtype=dtype)
    hidden = memory[1:-1, before : before + D]
    hidden.copy_(drawn)
    matrix, offset = (matrix / D**0.5).to(DEVICE, dtype), offset.to(DEVICE)
    # Heads are about 1: a small eps wouldn't show.
    gain, head_eps = gain.to(DEVICE), 0.25
    normed = None if head is None else HeadNorm(gain, head, head_eps)
    look = FirstLook(matrix, offset, matrix.float().sum(1) if centered else None, 1e-5, normed)
    heads = None if head is None else (gain.double().view(-1, head), head_eps)
    wanted = reference.projected(*(x.double() for x in (hidden, matrix, offset)), 1e-5, centered, heads)
    with monkeypatch.context() as unwritten:
        poisoned(unwritten)
        found = projected(hidden, look)
    assert found.dtype == dtype
    atol = 2e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * ROUNDING[dtype], atol=atol)


# Head size, eps of the queries' and keys' norms, and whether the kernel does these norms.
HEADS: dict[str, tuple[int, tuple[float, float] | None, bool]] = {
    "plain": (16, None, False),
    "normed heads": (16, (0.1, 0.1), True),
    "no power of 2": (24, (0.1, 0.1), False),
    "too large": (256, (0.1, 0.1), False),
    "two eps": (16, (0.1, 0.3), False),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_score_heads_by_kernel_are_those_of_torch(centered: bool, kind: str, monkeypatch: Any) -> None:
    """Biases, keys that are shared unevenly, norms of heads; the second time the branch's norm has changed, the third
    time a gain."""
    d, eps, by_kernel_too = HEADS[kind]
    D, T = 48, 200
    torch.manual_seed(0)
    heads = random_heads(3, 2, d, D).to(DEVICE)
    for side, of_side in zip((heads.query, heads.key), eps or (0.0, 0.0), strict=True):
        side.matrix.mul_(0.1)
        side.bias.normal_()
        if eps is not None:
            side.gain = torch.nn.Parameter(torch.rand(len(side.bias), d, device=DEVICE) + 0.5, requires_grad=False)
            side.eps = torch.tensor(of_side, device=DEVICE)
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
    in_torch: list[HeadProjection] = []
    normed = HeadProjection.normed

    def counted(*args: Any, **values: Any) -> None:
        calls.append(len(calls))
        launch(*args, **values)

    def noted(side: HeadProjection, x: torch.Tensor) -> torch.Tensor:
        in_torch.append(side)
        return normed(side, x)

    monkeypatch.setattr(projection, "launch", counted)
    for turn in (1, 2, 3):
        with monkeypatch.context() as plain:
            plain.setattr(score_heads, "projection_backend", lambda *_: "torch")
            wanted = scores(None)
        with monkeypatch.context() as by_kernel:
            by_kernel.setattr(score_heads, "projection_backend", lambda *_: "triton")
            by_kernel.setattr(HeadProjection, "normed", noted)
            found = scores(weights)
        assert len(calls) == turn
        assert in_torch == ([] if eps is None or by_kernel_too else [heads.query, heads.key] * turn)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        weights.weight.mul_(1.5)
        if turn == 2 and heads.key.gain is not None:
            heads.key.gain.mul_(-0.5)
            heads.forget()


def test_eps_of_heads_is_read_once(monkeypatch: Any) -> None:
    """Not each time where the branch's norm can train: reading it waits for the device."""
    heads = random_heads(2, 1, 16, 32)
    for side in (heads.query, heads.key):
        side.gain = torch.nn.Parameter(torch.ones(len(side.bias), 16), requires_grad=False)
        side.eps = torch.tensor(1e-6)
    weights = NormWeights(torch.nn.Parameter(torch.ones(32)), None, 1e-5, False)
    made = [heads._looks.of(torch.float32, weights)]
    monkeypatch.setattr(score_heads, "head_norm_backend", None)
    made.append(heads._looks.of(torch.float32, weights))
    assert made[0] is not made[1]
    assert made[0].heads is made[1].heads is not None
