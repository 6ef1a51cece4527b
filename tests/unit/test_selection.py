"""Layout, energy selection, scores and spans on hand-made numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from lemo.config import BranchSelection, Segments
from lemo.selection.energy import block_energy, select_by_energy
from lemo.selection.layout import build_layout, rows_left_out
from lemo.selection.placement import place_blocks
from lemo.selection.ranking import block_cap
from lemo.selection.scores import attention_informativeness, block_pair_scores, mlp_informativeness, select_by_score
from lemo.selection.spans import draw_spans

CPU = torch.device("cpu")


def kept_blocks(plan, layout):
    return sorted({int(layout.block_of_row[row]) for row in plan.rows})


def test_layout_counts_blocks_from_the_first_real_token():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    layout = build_layout(2, 8, 4, CPU, attention_mask=mask)
    assert layout.documents == ((3, 8), (8, 14))
    assert layout.block_of_row.tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert layout.block_tokens.tolist() == [4, 1, 4, 2]
    assert layout.document_of_block.tolist() == [0, 0, 1, 1]
    assert (layout.real_tokens, layout.packed) == (11, False)


def test_layout_starts_a_document_where_positions_restart():
    layout = build_layout(1, 7, 4, CPU, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1]]))
    assert layout.documents == ((0, 3), (3, 5), (5, 7))
    assert layout.packed


def test_a_mask_beats_positions_as_in_transformers():
    layout = build_layout(1, 4, 4, CPU, attention_mask=torch.ones(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert layout.documents == ((0, 4),)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 0, 1]]), "gaps"),
        (torch.zeros(1, 3), "no real token"),
        (torch.ones(1, 1, 3, 3), "2-D attention_mask"),
    ],
)
def test_masks_that_make_no_documents_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        build_layout(1, 3, 4, CPU, attention_mask=mask)


def test_energy_is_the_squared_norm_per_block_without_padding():
    mask = torch.tensor([[0, 1, 1, 1]])
    layout = build_layout(1, 4, 2, CPU, attention_mask=mask)
    grad = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 0.0], [0.0, 2.0]]])
    assert block_energy(grad, layout).tolist() == pytest.approx([14.0, 4.0])


def test_smallest_set_that_reaches_the_fidelity():
    layout = build_layout(1, 16, 4, CPU)
    energy = torch.tensor([1.0, 5.0, 0.0, 4.0]).double()
    for fidelity, blocks in ((0.5, [1]), (0.51, [1, 3]), (0.9, [1, 3]), (0.91, [0, 1, 3]), (1.0, [0, 1, 3])):
        plan = select_by_energy(energy, layout, fidelity, keep=None, labelled=None)
        assert kept_blocks(plan, layout) == blocks, fidelity
    assert select_by_energy(energy, layout, 0.9, None, None).fidelity == pytest.approx(0.9)


def test_fidelity_is_reached_per_document_however_faint():
    layout = build_layout(2, 8, 4, CPU)
    energy = torch.tensor([3.0, 1.0, 1e-30, 3e-30]).double()
    plan = select_by_energy(energy, layout, 0.7, None, None)
    assert kept_blocks(plan, layout) == [0, 3]
    assert plan.cu_seqlens == (0, 4, 8)


def test_labelled_blocks_come_first_and_keep_caps():
    layout = build_layout(1, 16, 4, CPU)
    energy = torch.tensor([8.0, 4.0, 2.0, 1.0]).double()
    labelled = torch.tensor([False, False, False, True])
    assert kept_blocks(select_by_energy(energy, layout, 0.5, 0.5, labelled), layout) == [0, 3]
    assert kept_blocks(select_by_energy(energy, layout, 0.99, 0.5, None), layout) == [0, 1]


def test_the_sink_is_kept_where_it_has_a_gradient_and_the_cap_leaves_another_block():
    layout = build_layout(2, 16, 4, CPU)
    energy = torch.tensor([1.0, 9.0, 2.0, 4.0, 0.0, 9.0, 2.0, 4.0]).double()
    labelled = torch.tensor([False, False, False, True] * 2)

    def kept(fidelity, keep, labelled=labelled):
        plan = select_by_energy(energy, layout, fidelity, keep, labelled, sink=True)
        return kept_blocks(plan, layout), plan.fidelity

    assert kept(0.0, None) == ([0, 3, 7], pytest.approx((5 / 16 + 4 / 15) / 2))
    assert kept(0.8, None) == ([0, 1, 3, 5, 7], pytest.approx((14 / 16 + 13 / 15) / 2))  # of 9 + 2, and of 9 + 2
    assert kept(0.85, None)[0] == [0, 1, 2, 3, 5, 6, 7]
    assert kept(0.5, None, None) == ([0, 1, 5], pytest.approx((10 / 16 + 9 / 15) / 2))
    assert kept(0.99, 0.5)[0] == [0, 3, 5, 7]
    assert kept(0.99, 0.25, None)[0] == [1, 5]
    assert kept(0.99, 0.25)[0] == [3, 7]


def test_labels_over_keep_are_refused_with_the_remedy():
    layout = build_layout(1, 16, 4, CPU)
    with pytest.raises(ValueError, match="policy='segments'"):
        select_by_energy(torch.ones(4).double(), layout, 0.9, 0.5, torch.tensor([True, True, True, False]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_keeps_its_document(bad):
    layout = build_layout(2, 8, 4, CPU)
    energy = torch.tensor([bad, 1.0, 3.0, 1.0]).double()
    assert kept_blocks(select_by_energy(energy, layout, 0.5, None, None), layout) == [0, 1, 2]


def test_priority_takes_the_place_of_energy_up_to_keep():
    layout = build_layout(1, 20, 4, CPU)
    energy = torch.tensor([6.0, 1.0, 0.0, 3.0, 0.0]).double()
    priority = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.8]).double()
    labelled = torch.tensor([False, True, False, False, False])
    plan = select_by_energy(energy, layout, 0.5, 0.6, None, priority)
    assert (kept_blocks(plan, layout), plan.fidelity) == ([2, 3, 4], pytest.approx(0.3))
    plan = select_by_energy(energy, layout, 0.1, 0.6, labelled, priority)
    assert (kept_blocks(plan, layout), plan.fidelity) == ([1, 2, 4], pytest.approx(0.1))
    with pytest.raises(ValueError, match="labelled blocks alone exceed keep"):
        select_by_energy(energy, layout, 0.9, 0.2, ~labelled, priority)


def test_cap_rounds_up_without_floating_point_surprises():
    layout = build_layout(1, 30, 1, CPU)
    assert block_cap(layout, 0.1) == (3,)
    assert block_cap(layout, 0.11) == (4,)
    assert block_cap(layout, 1.0) == (30,)


def test_pair_scores_equal_the_definition():
    torch.manual_seed(0)
    H, K, T, d, b = 4, 2, 11, 8, 4
    q, k = torch.randn(H, T, d), torch.randn(K, T, d)
    pair = (q @ k.repeat_interleave(H // K, 0).transpose(1, 2) * 0.3).relu().mean(0).tril()
    scores = block_pair_scores(q, k, 0.3, b, window=None)
    for i in range(3):
        for j in range(3):
            expected = pair[i * b : (i + 1) * b, j * b : (j + 1) * b].max()
            assert scores[i, j] == pytest.approx(float(expected), rel=1e-5), (i, j)
    assert torch.allclose(attention_informativeness(scores, causal=False), scores.sum(0) / scores.shape[0])
    causal = attention_informativeness(scores, causal=True)
    assert causal.tolist() == pytest.approx([0.0, float(scores[0, 0]), float(scores[1].sum() / 2)], rel=1e-5)


def test_pair_scores_respect_the_window():
    q = k = torch.ones(1, 8, 2)
    scores = block_pair_scores(q, k, 1.0, 2, window=3)
    assert (scores > 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_causal_mlp_score_is_the_predecessors():
    layout = build_layout(2, 4, 2, CPU)
    activity = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0])
    assert mlp_informativeness(activity, layout, causal=False).tolist() == [2.0, 6.0, 3.0, 7.0]
    assert mlp_informativeness(activity, layout, causal=True).tolist() == [0.0, 2.0, 0.0, 3.0]


def test_first_and_last_block_are_always_kept_in_forward_mode():
    layout = build_layout(2, 8, 2, CPU)
    score = torch.tensor([0.0, 5.0, 9.0, 0.0, 1.0, 2.0, 3.0, 0.5])
    plan = select_by_score(score, layout, BranchSelection(threshold=2.5), layer=0)
    assert kept_blocks(plan, layout) == [0, 1, 2, 3, 4, 6, 7]
    plan = select_by_score(score, layout, BranchSelection(keep=0.75), layer=0)
    assert kept_blocks(plan, layout) == [0, 2, 3, 4, 6, 7]
    plan = select_by_score(score, layout, BranchSelection(keep=(0.01, 1.0)), layer=0)
    assert kept_blocks(plan, layout) == [0, 3, 4, 7]
    assert select_by_score(score, layout, BranchSelection(keep=(0.01, 1.0)), layer=1).keep == 1.0


def test_spans_cover_a_document_and_weigh_what_was_not_drawn():
    layout = build_layout(1, 10, 4, CPU)
    seen = set()
    for seed in range(50):
        drawn = draw_spans(layout, Segments(spans=4, drawn=2), random.Random(seed))
        (ranges,) = drawn.ranges
        assert all(span in ((0, 3), (3, 6), (6, 9), (9, 10)) for span in ranges)
        assert drawn.weights == (2.0,)
        assert drawn.plan.rows.tolist() == [row for a, b in ranges for row in range(a, b)]
        seen.add(ranges)
    assert len(seen) == 6  # every pair of four spans


def test_a_document_shorter_than_its_spans_stays_unbiased():
    layout = build_layout(1, 3, 4, CPU)
    drawn = draw_spans(layout, Segments(spans=8, drawn=2), random.Random(0))
    assert drawn.weights == (1.5,)
    assert drawn.plan.rows.numel() == 2


def test_placed_blocks_are_the_labelled_ones_and_others_by_density():
    layout = build_layout(2, 32, 4, CPU)
    labelled = torch.tensor([False] * 7 + [True] + [False] * 8)

    def placed(keep, density):
        return place_blocks(layout, labelled, keep, density).nonzero().flatten().tolist()

    assert placed(0.5, [1.0]) == [0, 2, 4, 7, 8, 10, 12, 14]
    assert placed(0.125, [1.0]) == [7, 8]
    assert placed(1.0, [1.0]) == list(range(16))
    # seven free blocks: 4 and 3; eight: 4 and 4
    assert placed(0.5, [0.0, 1.0]) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert placed(0.5, [1.0, 3.0]) == [0, 4, 5, 7, 8, 12, 13, 14]
    assert placed(0.75, [0.0, 1.0]) == [0, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14, 15]


def ranked_by_the_book(score, layout, keep):
    """Blocks kept of each document: edges first, then by score, ties in order, what isn't a number last."""
    kept = []
    for first, count, cap in zip(
        layout.first_block.tolist(), layout.blocks_per_document, block_cap(layout, keep), strict=True
    ):
        found = score[first : first + count].tolist()
        inner = sorted((math.isnan(x), 0 if math.isnan(x) else -x, i) for i, x in enumerate(found[1:-1], 1))
        edges = sorted({0, count - 1})
        kept += sorted(first + i for i in edges + [i for *_, i in inner[: max(0, cap - len(edges))]])
    return kept


@pytest.mark.parametrize("lengths", [[40], [37], [3, 29, 4, 1, 13], [16, 16], [8, 21], [80, 1, 2, 1, 9, 1, 1]])
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.5, 0.99])
def test_the_highest_blocks_of_every_document(lengths, keep):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    layout = build_layout(1, sum(lengths), 4, CPU, position_ids=positions)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        score = torch.randint(4, (len(layout.block_tokens),), generator=generator).float()  # many ties
        score[torch.rand(score.shape, generator=generator) < 0.2] = random.choice([torch.inf, -torch.inf, torch.nan])
        plan = select_by_score(score, layout, BranchSelection(keep=keep), layer=0)
        blocks = ranked_by_the_book(score, layout, keep)
        rows = [row for row, block in enumerate(layout.block_of_row.tolist()) if block in blocks]
        assert plan.rows.tolist() == plan.host_rows.tolist() == rows
        ends = [sum(row < end for row in rows) for _, end in layout.documents]
        assert plan.cu_seqlens == (0, *ends)
        assert plan.keep == len(rows) / sum(lengths)
        left = rows_left_out(replace(plan, known_rows=None), layout)
        assert left.tolist() == sorted({*range(sum(lengths))} - {*rows})
