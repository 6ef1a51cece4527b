"""Score heads: attention's predictor, a few virtual heads whose scores of token pairs estimate the exact ones.

A pair's exact score is a mean over all heads of relu(q·k) (equation 1); the estimate is a sum over a few heads, and
what comes after is the same: a maximum over the tokens of two blocks, by the same kernel, and a sum over query blocks.
Heads begin as true ones of the layer and move little while they train (`lemo.selection.score_heads_training`). They
read the branch's normalised input and are positioned as the layer's own heads are. Why not numbers of whole blocks:
docs/decisions/0009.

Shapes: N rows, D hidden size, m virtual heads of size d, H and K the layer's query and key heads, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.selection.scores import attention_informativeness, best_pairs, block_pair_scores
from lemo.types import SequenceLayout

# [N, m, d] -> [m, N, d], as the layer positions its own heads in these rows.
Rotate = Callable[[Tensor], Tensor]
# Added to a pair's score, in nats, before its error counts by it.
_LEAST_SCORE = 0.1
# A chosen head weighs at least so much of a true one: at zero it could never learn.
_LEAST_WEIGHT = 0.1


@dataclass(frozen=True)
class Projection:
    """A layer's query or key heads before they are positioned, fp32.

    Attributes:
        matrix, bias: [H, d, D] and [H, d].
        gain, eps: of the RMS norm that each head goes through, [d]; None and 0 without.
    """

    matrix: Tensor
    bias: Tensor
    gain: Tensor | None = None
    eps: float = 0.0

    def heads(self, index: Tensor, factor_m: Tensor) -> HeadProjection:
        """Some heads, in that order, times a number each."""
        factor = factor_m[:, None]
        if self.gain is None:
            return HeadProjection(self.matrix[index] * factor[..., None], self.bias[index] * factor)
        # The norm would take a factor before it away.
        return HeadProjection(self.matrix[index], self.bias[index], self.gain * factor, self.eps)


class HeadProjection(nn.Module):
    """Queries or keys of virtual heads.

    Attributes:
        matrix, bias: [m, d, D] and [m, d].
        gain: [m, d], of an RMS norm of each head; None without norm. `eps` is that norm's.
    """

    eps: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.gain = None if gain is None else nn.Parameter(gain, requires_grad=False)
        self.register_buffer("eps", None if gain is None else torch.tensor(eps, device=matrix.device))

    def normed(self, heads_NMd: Tensor) -> Tensor:
        """What comes out of the norm, in the input's dtype, [N, m, d]."""
        if self.gain is None:
            return heads_NMd
        assert self.eps is not None
        wide = heads_NMd.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.gain).to(heads_NMd.dtype)


class ScoreHeads(nn.Module):
    """Virtual heads of one layer's attention.

    Args:
        query, key: of m heads each.
    """

    def __init__(self, query: HeadProjection, key: HeadProjection) -> None:
        super().__init__()
        self.query, self.key = query, key
        self._stacked: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Drops what was made from the matrices, which have changed."""
        self._stacked = None

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def count(self) -> int:
        """m."""
        return self.query.matrix.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its matrices lie."""
        return self.query.matrix.device

    @property
    def size(self) -> int:
        """Numbers that were fitted."""
        return sum(p.numel() for p in self.parameters())

    def positioned(self, x_ND: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Positioned queries and keys, [m, N, d] each, in the input's dtype.

        Args:
            x_ND: the branch's normalised input, of any number of documents.
            rotate: positions heads of these rows.
        """
        query, key = F.linear(x_ND, *self._stack(x_ND.dtype)).unflatten(-1, (2, self.count, -1)).unbind(-3)
        q, k = rotate(torch.cat([self.query.normed(query), self.key.normed(key)], 1)).chunk(2)
        return q, k

    def pair_scores(
        self, q_MNd: Tensor, k_MNd: Tensor, block_size: int, window: int | None, mass: bool = False
    ) -> Tensor:
        """One document's estimated pair scores, fp32 [n, n]; query block, key block, 0 above the diagonal.

        Args:
            q_MNd, k_MNd: `positioned` rows of it.
            block_size, window, mass: as `lemo.selection.scores.block_pair_scores`'.
        """
        # That takes the mean over heads, these are weighted already; masses are means of theirs, too.
        return block_pair_scores(q_MNd, k_MNd, 1.0 if mass else float(self.count), block_size, window, mass)

    def scores(
        self, x_ND: Tensor, rotate: Rotate, layout: SequenceLayout, window: int | None, *, causal: bool, mass: bool
    ) -> Tensor:
        """Estimated block scores of a batch, fp32 [blocks].

        Args:
            x_ND, rotate: as `positioned`'s, of all rows of the batch.
            layout: documents and blocks.
            window: sliding window in tokens, or None.
            causal: the score that looks at earlier blocks only.
            mass: what was estimated is softmax mass.
        """
        # Thresholds were chosen for scores computed so.
        with torch.autocast(x_ND.device.type, enabled=False):
            q, k = self.positioned(x_ND, rotate)
            pairs = (
                self.pair_scores(q[:, a:b], k[:, a:b], layout.block_size, window, mass) for a, b in layout.documents
            )
            return torch.cat([attention_informativeness(of_document, causal) for of_document in pairs])

    def _stack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All matrices [2·m·d, D] and biases in one, in a dtype; made once where they don't train."""
        held = self._stacked
        if held is None or held[0].dtype != dtype:
            sides = self.query, self.key
            held = (
                torch.cat([side.matrix.flatten(0, 1) for side in sides]).to(dtype),
                torch.cat([side.bias.flatten() for side in sides]).to(dtype),
            )
            self._stacked = None if self.query.matrix.requires_grad else held
        return held


def random_heads(count: int, head_size: int, width: int) -> ScoreHeads:
    """Heads that predict nothing, as large as those that do."""
    sides = (HeadProjection(torch.randn(count, head_size, width), torch.zeros(count, head_size)) for _ in range(2))
    return ScoreHeads(*sides)


def heads_of(tensors: dict[str, Tensor]) -> ScoreHeads:
    """Heads of a state dict.

    Raises:
        KeyError: a tensor is missing.
    """
    sides = []
    for side in ("query", "key"):
        matrix, bias = tensors[f"{side}.matrix"], tensors[f"{side}.bias"]
        gain = tensors.get(f"{side}.gain")
        sides.append(HeadProjection(matrix, bias, gain, 0.0 if gain is None else float(tensors[f"{side}.eps"])))
    found = ScoreHeads(*sides)
    found.load_state_dict(tensors)
    return found


@torch.no_grad()
def begin_heads(
    projections: tuple[Projection, Projection],
    q_HNd: Tensor,
    k_KNd: Tensor,
    scaling: float,
    count: int,
    block_size: int,
    window: int | None,
    mass: bool = False,
) -> ScoreHeads:
    """The true heads that together tell one document's exact scores best, each with a weight.

    They are chosen one after the other by least squares without negative weights, over the token pairs that make the
    exact scores; a pair's error counts by its score. Where scores are masses it is the mean of the heads' masses, over
    block pairs, since no weight passes a softmax.

    Args:
        projections: of the layer's queries and keys.
        q_HNd, k_KNd: its positioned queries and keys in the document.
        scaling: factor on q·k.
        count: heads wanted; a layer's own are all there can be.
        block_size, window, mass: as `block_pair_scores`'.
    """
    H, K = len(q_HNd), len(k_KNd)
    if mass:
        by_head = [
            block_pair_scores(q_HNd[h, None], k_KNd[h // (H // K), None], scaling, block_size, window, True)
            for h in range(H)
        ]
        wanted = torch.stack(by_head, -1).flatten(0, 1)
    else:
        queries, keys, there = best_pairs(q_HNd, k_KNd, block_size, window)
        rows, columns = queries[there], keys[there]
        # One head's rows in memory at a time.
        products = [(q_HNd[h, rows].float() * k_KNd[h // (H // K), columns].float()).sum(-1) for h in range(H)]
        wanted = (torch.stack(products, 1) * scaling).relu()
    chosen, weights = _choose(wanted, min(count, H), equal=mass)
    index = torch.tensor(chosen, device=q_HNd.device)
    weight = torch.tensor(weights, device=q_HNd.device).clamp(min=_LEAST_WEIGHT / H)
    factor = torch.full_like(weight, scaling).sqrt() if mass else (weight * scaling).sqrt()
    query, key = projections
    return ScoreHeads(query.heads(index, factor), key.heads(index // (H // K), factor))


def _choose(by_head_PH: Tensor, count: int, equal: bool) -> tuple[list[int], list[float]]:
    """Heads whose weighted sum comes nearest to the mean of all, greedily, and their weights.

    Args:
        by_head_PH: scores of P pairs by each head.
        count: how many.
        equal: whether all chosen weigh the same.
    """
    wide = by_head_PH.double()
    mean = wide.mean(1)
    if equal:
        rows = wide
    else:
        rows, mean = wide / (mean + _LEAST_SCORE)[:, None], mean / (mean + _LEAST_SCORE)
    gram, target, total = (rows.T @ rows).cpu(), (rows.T @ mean).cpu(), float(mean.square().sum())
    chosen: list[int] = []
    weights: list[float] = []
    for _ in range(count):
        found = []
        for head in range(len(gram)):
            if head not in chosen:
                these = [*chosen, head]
                part, aim = gram[these][:, these], target[these]
                w = torch.full_like(aim, 1 / len(these)) if equal else _nonnegative(part, aim)
                found.append((float(w @ part @ w - 2 * w @ aim) + total, these, w.tolist()))
        _, chosen, weights = min(found, key=lambda one: one[0])
    return chosen, weights


def _nonnegative(gram: Tensor, target: Tensor) -> Tensor:
    """Least squares of normal equations; while a weight is negative the most negative one becomes 0."""
    weights = torch.zeros_like(target)
    active = torch.ones_like(target, dtype=torch.bool)
    while active.any():
        solved = torch.linalg.lstsq(gram[active][:, active], target[active, None]).solution[:, 0]
        if bool((solved >= 0).all()):
            weights[active] = solved
            break
        active[active.nonzero()[solved.argmin()]] = False
    return weights
