"""Which true heads a layer's score heads begin as, and how many a layer has (elastic size, paper section 4.3).

Heads are chosen one after the other. Where none are to be taken away, each gets its own keys. Where fewer numbers are
to be left, heads of one group share the keys that they share in the model, and heads go to the layers where they add
most recall for their size.

Shapes: H and K a layer's query and key heads, N rows of one document, d head size, P token pairs, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lemo.selection.score_errors import recall
from lemo.selection.score_heads import Projection, ScoreHeads
from lemo.selection.scores import attention_informativeness, best_pairs, block_pair_scores

# Added to a pair's score, in nats, before its error counts by it.
_LEAST_SCORE = 0.1
# A chosen head weighs at least so much of a true one: at zero it could never learn.
_LEAST_WEIGHT = 0.1
# Shares of the blocks whose recall tells what heads are worth: several, since a document has few blocks.
_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Choice:
    """True heads that together tell a layer's exact scores.

    Attributes:
        heads: of the layer's H.
        weights: what each counts.
    """

    heads: tuple[int, ...]
    weights: tuple[float, ...]

    def keys(self, group: int) -> tuple[int, ...]:
        """The key heads they meet, each once, where so many query heads share one."""
        return tuple(sorted({head // group for head in self.heads}))


@torch.no_grad()
def choices(
    q_HNd: Tensor, k_KNd: Tensor, scaling: float, most: int, block_size: int, window: int | None, mass: bool = False
) -> list[Choice]:
    """The best one head, the best two that contain it, and so on, by one document.

    They are chosen one after the other by least squares without negative weights, over the token pairs that make the
    exact scores; a pair's error counts by its score. Where scores are masses it is the mean of the heads' masses, over
    block pairs, since no weight passes a softmax.

    Args:
        q_HNd, k_KNd: a layer's positioned queries and keys in the document.
        scaling: factor on q·k.
        most: heads in the last choice; a layer's own are all there can be.
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
    return _choose(wanted, min(most, H), equal=mass)


def begin_heads(
    projections: tuple[Projection, Projection], choice: Choice, scaling: float, *, shared: bool, mass: bool = False
) -> ScoreHeads:
    """Score heads that are a choice of a layer's true ones.

    Args:
        projections: of its queries and keys.
        choice: which.
        scaling: factor on q·k.
        shared: heads of a group have the same keys; otherwise each has its own, equal ones.
        mass: weights are left out.
    """
    query, key = projections
    device, group = query.matrix.device, len(query.matrix) // len(key.matrix)
    met = [head // group for head in choice.heads]
    keys = list(choice.keys(group)) if shared else met
    key_of = [keys.index(one) for one in met] if shared else list(range(len(met)))
    weight = torch.ones(len(met), device=device) if mass else _weights(choice, len(query.matrix), device)
    return ScoreHeads(
        query.heads(torch.tensor(choice.heads, device=device), weight * scaling),
        key.heads(torch.tensor(keys, device=device)),
        torch.tensor(key_of, device=device),
    )


def recall_of(
    choice: Choice,
    q_HNd: Tensor,
    k_KNd: Tensor,
    exact_n: Tensor,
    scaling: float,
    block_size: int,
    window: int | None,
    *,
    causal: bool,
    mass: bool,
) -> float:
    """How well a choice's estimates tell a document's best blocks; mean recall of several shares of them.

    Args:
        choice: of the layer's heads.
        q_HNd, k_KNd: its positioned queries and keys.
        exact_n: exact block scores.
        scaling, block_size, window, mass: as `block_pair_scores`'.
        causal: as `attention_informativeness`'s.
    """
    heads = torch.tensor(choice.heads, device=q_HNd.device)
    q = q_HNd[heads]
    if not mass:
        q = q * _weights(choice, len(q_HNd), q.device)[:, None, None].to(q.dtype)
    pairs = block_pair_scores(q, k_KNd[heads // (len(q_HNd) // len(k_KNd))], scaling, block_size, window, mass)
    found = attention_informativeness(pairs, causal)
    return fmean(recall(found, exact_n, share) for share in _SHARES)


def allot(recalls: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], most: int) -> list[int]:
    """How many heads each layer has.

    All layers begin with one. Then the step that adds most recall for its numbers is made, of one layer by one head or
    several, until no step fits.

    Args:
        recalls: of each layer, with 1, 2, ... heads.
        sizes: numbers of as many, for each layer alike.
        most: numbers of all layers together; a head in each there is in any case.
    """
    counts = [1] * len(recalls)
    left = most - sum(of_layer[0] for of_layer in sizes)
    while True:
        steps = []
        for layer, (worth, size) in enumerate(zip(recalls, sizes, strict=True)):
            at = counts[layer]
            for to in range(at + 1, len(worth) + 1):
                cost, gain = size[to - 1] - size[at - 1], worth[to - 1] - worth[at - 1]
                if cost <= left:
                    steps.append((gain / max(cost, 1), layer, to, cost))
        if not steps or max(steps)[0] <= 0:
            return counts
        _, layer, counts_to, cost = max(steps)
        counts[layer] = counts_to
        left -= cost


def _weights(choice: Choice, of: int, device: torch.device) -> Tensor:
    return torch.tensor(choice.weights, device=device).clamp(min=_LEAST_WEIGHT / of)


def _choose(by_head_PH: Tensor, count: int, equal: bool) -> list[Choice]:
    """Heads whose weighted sum comes nearest to the mean of all, greedily, and their weights.

    Args:
        by_head_PH: scores of P pairs by each head.
        count: how many at most.
        equal: whether all chosen weigh the same.
    """
    wide = by_head_PH.double()
    mean = wide.mean(1)
    if equal:
        rows = wide
    else:
        rows, mean = wide / (mean + _LEAST_SCORE)[:, None], mean / (mean + _LEAST_SCORE)
    gram, target, total = (rows.T @ rows).cpu(), (rows.T @ mean).cpu(), float(mean.square().sum())
    made: list[Choice] = []
    for _ in range(count):
        found = []
        before = list(made[-1].heads) if made else []
        for head in range(len(gram)):
            if head not in before:
                these = [*before, head]
                part, aim = gram[these][:, these], target[these]
                # All of them are the mean, whatever one document leaves open.
                even = equal or len(these) == len(gram)
                w = torch.full_like(aim, 1 / len(these)) if even else _nonnegative(part, aim)
                found.append((float(w @ part @ w - 2 * w @ aim) + total, these, w.tolist()))
        _, heads, weights = min(found, key=lambda one: one[0])
        made.append(Choice(tuple(heads), tuple(weights)))
    return made


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
