"""Exact informativeness of token blocks, from a layer's own queries, keys and MLP (paper equations 1-2, section 4.1).

Equation 1: a token pair's score is the head-mean of the positive scaled q·k. Equation 2: a block pair's score is the
maximum over its token pairs. A block's informativeness is the sum of its pair scores over the later query blocks, so
the paper's selection looks ahead; the causal variant judges a block by its predecessor's view of the past. In place of
the equations' pair scores there is the softmax mass that a block's queries give to another's keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.config import BranchSelection
from lemo.kernels.dispatch import MOST_STRIDE, NEAR_STRIPS, STRIP, scores_backend
from lemo.selection.ranking import plan_of_marked
from lemo.selection.top import plan_of_top
from lemo.types import SequenceLayout, TokenPlan

_SCORES_AT_ONCE = 2**26


def block_pair_scores(
    q_HTd: Tensor,
    k_KTd: Tensor,
    scaling: float,
    block_size: int,
    window: int | None,
    mass: bool = False,
    *,
    sampled: bool = False,
) -> Tensor:
    """Pair scores of one document (equations 1-2), fp32 [blocks, blocks]; query block I, key block J, 0 above I.

    Args:
        q_HTd, k_KTd: positioned queries and keys of the document's tokens.
        scaling: factor on q·k.
        block_size: tokens per block.
        window: sliding window in tokens, or None.
        mass: in place of the equations', the softmax mass that I's queries give to J's keys; mean over heads and
            queries, so that a row's scores sum to 1.
        sampled: for estimates whose column sums are all that counts: most of the distant query blocks are left out,
            0, and the others' scores multiplied by how many they stand for (`sample_weights`). Not with mass, nor with
            a window, which hides some of those.

    Raises:
        ValueError: sampled, and mass or a window too.

    On a GPU by a kernel that stores nothing but the scores; otherwise one chunk of query blocks times T at a time.
    """
    if sampled and (mass or window is not None):
        raise ValueError("block-pair scores are sampled without mass or a window: leave those out")
    if scores_backend(q_HTd, k_KTd, block_size) == "triton":
        from lemo.kernels.scores import block_pair_scores as by_kernel

        return by_kernel(q_HTd, k_KTd, scaling, block_size, window, mass, sampled=sampled)
    scores = _block_pair_scores(q_HTd, k_KTd, scaling, block_size, window, mass)
    return scores.mul_(sample_weights(len(scores), block_size, scores.device)) if sampled else scores


def sample_weights(blocks: int, block_size: int, device: torch.device) -> Tensor:
    """How many query blocks each sampled pair score stands for, 0 for none; fp32 [blocks, blocks], as the scores.

    Blocks go by strips of 128 tokens (larger ones are strips themselves), all pairs of two strips alike. Of the query
    strips at a distance every s-th is looked at, and stands for itself and the s - 1 after it, or those there are: s is
    1 below 16 strips, 2 from there, 4 from 32, 8 from 64, 16 from 128. The distance counts from the first multiple of
    16 that isn't before the key's strip, so that s changes where its multiples are, and a column of strips sums to
    the query strips that see it.
    """
    side = max(1, STRIP // block_size)
    strips = -(-blocks // side)
    strip = torch.arange(strips, device=device)
    row_S1, distance_SS = strip[:, None], strip[:, None] + -strip // MOST_STRIDE * MOST_STRIDE
    stride_SS = torch.ones_like(distance_SS)
    for doubling in range(MOST_STRIDE.bit_length() - 1):
        stride_SS[distance_SS >= NEAR_STRIPS << doubling] = 2 << doubling
    weight_SS = torch.where(row_S1 % stride_SS == 0, stride_SS.minimum(strips - row_S1), 0).tril().float()
    return weight_SS.repeat_interleave(side, 0).repeat_interleave(side, 1)[:blocks, :blocks]


def sampled_share(tokens: int) -> float:
    """Share of a document's pairs of strips that sampling leaves."""
    strips = -(-tokens // STRIP)
    return int((sample_weights(strips, STRIP, torch.device("cpu")) > 0).sum()) / (strips * (strips + 1) / 2)


def _block_pair_scores(
    q_HTd: Tensor, k_KTd: Tensor, scaling: float, block_size: int, window: int | None, mass: bool
) -> Tensor:
    H, T, d = q_HTd.shape
    K = k_KTd.shape[0]
    blocks = -(-T // block_size)
    scores = torch.zeros(blocks, blocks, dtype=torch.float32, device=q_HTd.device)
    position = torch.arange(T, device=q_HTd.device)
    step = max(1, _SCORES_AT_ONCE // (T * H * block_size)) * block_size
    for start in range(0, T, step):
        end = min(start + step, T)
        q = q_HTd[:, start:end].reshape(K, H // K, end - start, d)
        pair = (q @ k_KTd[:, None, :end].transpose(-1, -2)).float().mul_(scaling)
        seen = position[None, :end] <= position[start:end, None]
        if window is not None:
            seen &= position[None, :end] > position[start:end, None] - window
        pair = pair.masked_fill_(~seen, -torch.inf).softmax(-1) if mass else pair.relu_()
        pair = torch.where(seen, pair.mean((0, 1)), 0.0)
        rows, columns = -(-(end - start) // block_size), -(-end // block_size)
        # Scores are >= 0, so zero padding never wins a maximum.
        pair = torch.nn.functional.pad(pair, (0, columns * block_size - end, 0, rows * block_size - (end - start)))
        pair = pair.view(rows, block_size, columns, block_size)
        if mass:
            queries = (T - position[start:end:block_size]).clamp(max=block_size)
            pair = pair.sum((1, 3)) / queries[:, None]
        else:
            pair = pair.amax((1, 3))
        scores[start // block_size : start // block_size + rows, :columns] = pair
    return scores


def best_pairs(q_HTd: Tensor, k_KTd: Tensor, block_size: int, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The token pair of the highest score in each block pair, of one document; torch alone.

    Args:
        q_HTd, k_KTd, block_size, window: as `block_pair_scores`'.

    Returns:
        Query rows and key rows, int64 [blocks, blocks], and whether a query of the block sees a key of the other, bool
        alike; only where it does do the rows mean anything.
    """
    T, K, size = q_HTd.shape[1], k_KTd.shape[0], block_size
    blocks = -(-T // size)
    best = torch.zeros(blocks, blocks, dtype=torch.int64, device=q_HTd.device)
    there = torch.zeros_like(best, dtype=torch.bool)
    position = torch.arange(T, device=q_HTd.device)
    step = max(1, _SCORES_AT_ONCE // (T * q_HTd.shape[0] * size)) * size
    for start in range(0, T, step):
        end = min(start + step, T)
        pair = q_HTd[:, start:end].unflatten(0, (K, -1)) @ k_KTd[:, None, :end].mT
        pair = pair.float().relu_().sum((0, 1))
        seen = position[None, :end] <= position[start:end, None]
        if window is not None:
            seen &= position[None, :end] > position[start:end, None] - window
        rows, columns = -(-(end - start) // size), -(-end // size)
        padding = (0, columns * size - end, 0, rows * size - (end - start))
        pair = torch.nn.functional.pad(pair.where(seen, -1.0), padding, value=-1.0)
        largest, index = pair.view(rows, size, columns, size).transpose(1, 2).flatten(2).max(-1)
        place = slice(start // size, start // size + rows), slice(0, columns)
        best[place], there[place] = index, largest >= 0
    first = size * torch.arange(blocks, device=q_HTd.device)
    return first[:, None] + best // size, first + best % size, there


def attention_informativeness(pair_scores: Tensor, causal: bool) -> Tensor:
    """A document's block scores from its pair scores, fp32 [blocks].

    The paper's: sum over later query blocks, here divided by the document's blocks, which changes no order in it and
    lets one threshold serve documents of any length. Causal: the mean of the preceding block's own row, 0 for the
    first.
    """
    return pair_scores.sum(0) / pair_scores.shape[0] if not causal else causal_view(pair_scores.sum(1))


def causal_view(row_sums: Tensor) -> Tensor:
    """Each block gets its predecessor's mean over the blocks that it sees, 0 for the first.

    Args:
        row_sums: of each query block, its pair scores summed, [..., blocks].
    """
    return from_predecessor(row_sums / torch.arange(1, row_sums.shape[-1] + 1, device=row_sums.device))


def from_predecessor(score: Tensor) -> Tensor:
    """A document's scores moved on by a block, so that earlier blocks decide each; 0 for the first, [..., blocks]."""
    return torch.nn.functional.pad(score[..., :-1], (1, 0))


def mlp_informativeness(activity: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
    """Block scores [blocks] from each row's MLP activity [B·T]: the block's mean, or causally its predecessor's."""
    real = layout.block_of_row >= 0
    total = activity.new_zeros(layout.block_tokens.numel())
    total.index_add_(0, layout.block_of_row[real], activity[real])
    score = total / layout.block_tokens
    return previous_blocks(score, layout) if causal else score


def block_means(rows: Tensor, size: int) -> Tensor:
    """Mean over each block's rows, the last of which may be short; fp32 or wider, [..., n] of [..., N]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    whole = rows.shape[-1] // size
    mean = rows[..., : whole * size].unflatten(-1, (whole, size)).mean(-1, dtype=wide)
    rest = rows[..., whole * size :]
    return torch.cat([mean, rest.mean(-1, keepdim=True, dtype=wide)], -1) if rest.shape[-1] else mean


def previous_blocks(score: Tensor, layout: SequenceLayout) -> Tensor:
    """Each block's predecessor's score, 0 for a document's first; [blocks] of a batch."""
    return score.roll(1).index_fill(0, layout.first_block, 0.0)


def select_by_score(score: Tensor, layout: SequenceLayout, selection: BranchSelection, layer: int) -> TokenPlan:
    """The plan of one branch: the highest blocks (`keep`) or those at or above the layer's `threshold`.

    The first and the last block of each document are always kept (DESIGN 4.6).

    Args:
        score: [blocks].
        selection: keep or threshold, one number or one a layer.
        layer: index of the layer.
    """
    if selection.threshold is None:
        assert selection.keep is not None
        return plan_of_top(score, layout, _at(selection.keep, layer))
    return plan_of_marked((score >= _at(selection.threshold, layer)) | layout.edge_block, layout)


def keeps_everything(selection: BranchSelection, layer: int) -> bool:
    """Whether a layer's branch stays dense whatever the scores, which are never negative."""
    if selection.threshold is not None:
        return _at(selection.threshold, layer) <= 0.0
    assert selection.keep is not None
    return _at(selection.keep, layer) == 1.0


def _at(value: float | tuple[float, ...], layer: int) -> float:
    return value[layer] if isinstance(value, tuple) else value
