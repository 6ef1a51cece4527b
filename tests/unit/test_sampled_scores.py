"""Block-pair scores of which distant query blocks are left out: who stands for whom, and what columns sum to."""

from __future__ import annotations

import pytest
import torch

from lemo.kernels import reference
from lemo.kernels.dispatch import MOST_STRIDE, NEAR_STRIPS
from lemo.selection.scores import block_pair_scores, sample_weights, sampled_share

CPU = torch.device("cpu")
SIZES = [8, 16, 64, 128, 256]


def side_of(block_size):
    """Blocks a strip."""
    return max(1, 128 // block_size)


def test_columns_by_hand():
    weights = sample_weights(64, 128, CPU)
    assert weights[:16, 0].tolist() == [1.0] * 16
    assert weights[16:32, 0].tolist() == [2.0, 0.0] * 8
    assert weights[32:, 0].tolist() == [4.0, 0.0, 0.0, 0.0] * 8
    # The second strip's distances count from the sixteenth.
    assert weights[1:32, 1].tolist() == [1.0] * 31
    assert weights[32:48, 1].tolist() == [2.0, 0.0] * 8
    # The last one stands for the two that there are.
    assert sample_weights(42, 128, CPU)[32:, 0].tolist() == [4.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("strips", [1, 16, 17, 32, 40, 67, 130, 145, 300])
def test_weights_count_the_strips_that_see_a_column(strips):
    weights = sample_weights(strips, 128, CPU)
    assert not weights.triu(1).any()
    assert torch.equal(weights.sum(0), torch.arange(strips, 0, -1.0))
    assert weights.max() <= MOST_STRIDE


@pytest.mark.parametrize("block_size", SIZES)
def test_blocks_of_a_strip_weigh_alike(block_size):
    side = side_of(block_size)
    of_strips = sample_weights(40, 128, CPU)
    blocks = 40 * side - side // 2
    rows = torch.arange(blocks) // side
    assert torch.equal(sample_weights(blocks, block_size, CPU), of_strips[rows[:, None], rows])


@pytest.mark.parametrize("block_size", SIZES)
def test_columns_sum_to_the_exact_ones_where_query_blocks_score_alike(block_size):
    T, side = 40 * 128, side_of(block_size)
    q, k = torch.ones(1, 1, 4).expand(2, T, 4), torch.randn(1, T, 4)
    exact = block_pair_scores(q, k, 1.0, block_size, None)
    found = block_pair_scores(q, k, 1.0, block_size, None, sampled=True)
    blocks = len(exact)
    assert blocks > side * NEAR_STRIPS
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found.sum(0), exact.sum(0))


@pytest.mark.parametrize("block_size", SIZES)
def test_sampled_scores_are_the_twins(block_size):
    q, k = torch.randn(2, 4501, 4), torch.randn(1, 4501, 4)
    found = block_pair_scores(q, k, 0.5, block_size, None, sampled=True)
    wanted = reference.block_pair_scores(q, k, 0.5, block_size, None, sampled=True)
    torch.testing.assert_close(found, wanted)


def test_how_much_sampling_leaves():
    assert sampled_share(2048) == 1.0
    # 33 strips: of the first column's 33 sixteen, eight, one; of the others' all.
    assert sampled_share(33 * 128 - 5) == pytest.approx((25 + 32 * 33 / 2) / (33 * 34 / 2))
    assert 0.3 < sampled_share(32768) < 0.35


def test_short_documents_are_left_as_they_are():
    q, k = torch.randn(2, 2048, 4), torch.randn(1, 2048, 4)
    assert torch.equal(block_pair_scores(q, k, 0.5, 16, None, sampled=True), block_pair_scores(q, k, 0.5, 16, None))


@pytest.mark.parametrize(("mass", "window"), [(True, None), (False, 16)])
def test_masses_and_windows_cannot_be_sampled(mass, window):
    q = torch.randn(1, 32, 4)
    with pytest.raises(ValueError, match="without mass or a window"):
        block_pair_scores(q, q, 1.0, 16, window, mass, sampled=True)
