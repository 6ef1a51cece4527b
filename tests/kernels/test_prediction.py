"""An MLP predictor's look at every token against its twin in fp64: norms, short blocks, padding, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import DEVICE, DTYPES, poisoned
from torch import Tensor, nn

from lemo.kernels import reference
from lemo.selection.layout import build_layout
from lemo.selection.predictor import ActivityPredictor, predicted_scores
from lemo.selection.scores import previous_blocks
from lemo.types import NormWeights, SequenceLayout

pytest.importorskip("triton")
from lemo.kernels.prediction import FirstLook, mean_activity

# D, numbers, width of the second matrix, tokens a block.
SIZES = {
    "small": (40, 5, 4, 16),
    "odd": (200, 37, 19, 24),
    "default": (576, 128, 64, 64),
    "blocks of 128": (136, 100, 20, 128),
    "one token": (64, 16, 16, 1),
}


def layout_of(block: int) -> SequenceLayout:
    """Two sequences of 101 rows: the first begins with padding, the second holds two documents."""
    mask = torch.ones(2, 101, dtype=torch.int64)
    mask[0, :10] = 0
    positions = torch.cat([torch.arange(101), torch.arange(40), torch.arange(61)]).view(2, 101)
    return build_layout(2, 101, block, torch.device(DEVICE), mask, positions)


def draw(D: int, r: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((202, D), (r, D), (r,), (r, m), (m,))
    hidden, matrix, offset, second, third = (torch.randn(s, generator=generator) for s in shapes)
    # A residual stream has a mean and a few loud numbers.
    hidden = (3 * hidden + 1).index_fill(1, torch.tensor([1]), 30.0)
    found = [x.to(DEVICE, dtype) for x in (hidden, matrix / D**0.5, second / r**0.5, third)]
    return [*found, offset.to(DEVICE)]


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_twin(size: str, dtype: torch.dtype, centered: bool, monkeypatch: Any) -> None:
    D, r, m, block = SIZES[size]
    layout = layout_of(block)
    hidden, matrix, second, third, offset = draw(D, r, m, dtype)
    look = FirstLook(matrix, offset, matrix.float().sum(1) if centered else None, 1e-5)
    wide = [x.double() for x in (hidden, matrix, offset)]
    low = reference.first_look(*wide, 1e-5, centered)
    first, tokens = layout.first_row_of_block.tolist(), layout.block_tokens.tolist()
    blocks = [low[a : a + t] for a, t in zip(first, tokens, strict=True)]
    # Padding belongs to no block.
    hidden[:10] = float("nan")
    poisoned(monkeypatch)
    where = (layout.first_row_of_block, layout.block_tokens, block)
    found = mean_activity(hidden, look, second, third, *where)
    # The tokens' numbers are rounded to the inputs' precision for the second product, whose sums may cancel.
    rounded = [b.to(dtype).double() for b in blocks]
    active = torch.stack([torch.relu(torch.relu(b @ second.double()) @ third.double()).mean() for b in rounded])
    size = max(float((b @ second.double().abs() @ third.double().abs()).max()) for b in rounded)
    torch.testing.assert_close(found.double(), active, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("causal", [False, True], ids=["paper", "causal"])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_a_predictors_scores_are_those_of_its_torch_path(centered: bool, causal: bool, monkeypatch: Any) -> None:
    D = 48
    torch.manual_seed(0)
    predictor = ActivityPredictor(D, (12, 9)).to(DEVICE)
    predictor.center.normal_()
    predictor.spread.uniform_(0.5, 2.0)
    predictor.scale.fill_(0.3)
    norm: Any = torch.nn.LayerNorm(D, device=DEVICE) if centered else torch.nn.RMSNorm(D, eps=1e-5, device=DEVICE)
    norm.weight.data.uniform_(0.5, 1.5)
    if centered:
        norm.bias.data.normal_()
    weights = NormWeights(norm.weight.detach(), norm.bias.detach() if centered else None, 1e-5, centered)
    layout, hidden = layout_of(16), draw(D, 1, 1, torch.float32)[0]
    monkeypatch.setenv("LEMO_KERNELS", "torch")
    # The second time as a norm that trains: the matrices follow.
    for _ in range(2):
        with torch.no_grad():
            wanted = predicted_scores(predictor, hidden, norm, weights, layout, causal)
        found = predictor.by_kernel(hidden, weights, layout)
        found = previous_blocks(found, layout) if causal else found
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        weights.weight.mul_(1.5)


@pytest.mark.parametrize("trains", [True, False])
def test_weights_of_a_norm_may_change(trains: bool) -> None:
    """Fused optimizers, the Trainer's default, change weights without telling their version."""
    predictor = ActivityPredictor(32, (8, 8)).to(DEVICE)
    layout = build_layout(1, 64, 16, torch.device(DEVICE))
    hidden = torch.randn(64, 32, device=DEVICE)
    weight = nn.Parameter(torch.ones(32, device=DEVICE), requires_grad=trains)

    @torch.no_grad()
    def scores() -> torch.Tensor:
        return predictor.by_kernel(hidden, NormWeights(weight, None, 1e-6, False), layout)

    before = scores()
    if trains:
        weight.grad = torch.randn_like(weight)
        torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    else:
        with torch.no_grad():
            weight.mul_(torch.rand_like(weight))
    after = scores()
    predictor.forget()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, scores(), rtol=0, atol=0)
    # Another weight in the old one's place.
    weight = nn.Parameter(weight.detach() + 1, requires_grad=False)
    assert not torch.equal(scores(), after)
