"""Score heads: attention's predictor, a few virtual heads whose scores of token pairs estimate the exact ones.

A pair's exact score is a mean over all heads of relu(q·k) (equation 1); the estimate is a sum over a few heads, and
what comes after is the same: a maximum over the tokens of two blocks, by the same kernel, and a sum over query blocks.
Heads begin as true ones of the layer (`lemo.selection.head_choice`) and move little while they train
(`lemo.selection.score_heads_training`). They read the branch's normalised input and are positioned as the layer's own
heads are. Why not numbers of whole blocks: docs/decisions/0009.

Shapes: N rows, D hidden size, m virtual heads of size d with g keys (g <= m), H and K the layer's query and key heads,
n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.kernels.dispatch import head_norm_backend, projection_backend
from lemo.selection.first_looks import FirstLooks
from lemo.selection.scores import attention_informativeness, block_pair_scores
from lemo.types import NormWeights, SequenceLayout

if TYPE_CHECKING:
    from lemo.kernels.projection import HeadNorm

# [N, m, d] -> [m, N, d], as the layer positions its own heads in these rows.
Rotate = Callable[[Tensor], Tensor]


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

    @property
    def size(self) -> int:
        """Numbers of one head that may be fitted."""
        return sum(x[0].numel() for x in (self.matrix, self.bias)) + (0 if self.gain is None else self.gain.numel())

    def heads(self, index: Tensor, factor_m: Tensor | None = None) -> HeadProjection:
        """Some heads, in that order, times a number each."""
        matrix, bias, gain = self.matrix[index], self.bias[index], self.gain
        if gain is not None:
            # The norm would take a factor before it away.
            gain = gain.expand(len(index), -1).clone()
            return HeadProjection(matrix, bias, gain if factor_m is None else gain * factor_m[:, None], self.eps)
        if factor_m is not None:
            matrix, bias = matrix * factor_m[:, None, None], bias * factor_m[:, None]
        return HeadProjection(matrix, bias)


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
        query, key: of m and of g heads.
        key_of: the key that each query head meets, int64 [m].
    """

    key_of: Tensor

    def __init__(self, query: HeadProjection, key: HeadProjection, key_of: Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key
        self.register_buffer("key_of", key_of)
        self._stacked: tuple[Tensor, Tensor] | None = None
        self._looks = FirstLooks(self._affine, self._head_norm)
        # Whether equally many neighbours share each key, which needs no copies.
        m, g = self.count, key.matrix.shape[0]
        self._even = m % g == 0 and key_of.tolist() == [head // (m // g) for head in range(m)]

    def forget(self) -> None:
        """Drops what was made from the matrices and gains, which have changed."""
        self._stacked = None
        self._looks.forget()

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
        """Positioned queries and keys, in the input's dtype; [m, N, d] each, or g heads of keys where equally many
        neighbours share them.

        Args:
            x_ND: the branch's normalised input, of any number of documents.
            rotate: positions heads of these rows.
        """
        return self._placed(F.linear(x_ND, *self._stack(x_ND.dtype)), rotate, normed=False)

    def _placed(self, projected: Tensor, rotate: Rotate, *, normed: bool) -> tuple[Tensor, Tensor]:
        m, g = self.count, self.key.matrix.shape[0]
        heads = projected.unflatten(-1, (m + g, -1))
        if self.query.gain is not None and not normed:
            heads = torch.cat([self.query.normed(heads[:, :m]), self.key.normed(heads[:, m:])], 1)
        q, k = rotate(heads).split((m, g))
        return q, k if self._even else k[self.key_of]

    def pair_scores(
        self,
        q_MNd: Tensor,
        k_MNd: Tensor,
        block_size: int,
        window: int | None,
        *,
        mass: bool = False,
        sampled: bool = False,
    ) -> Tensor:
        """One document's estimated pair scores, fp32 [n, n]; query block, key block, 0 above the diagonal.

        Args:
            q_MNd, k_MNd: `positioned` rows of it.
            block_size, window, mass, sampled: as `lemo.selection.scores.block_pair_scores`'.
        """
        # That takes the mean over heads, these are weighted already; masses are means of theirs, too.
        scale = 1.0 if mass else float(self.count)
        return block_pair_scores(q_MNd, k_MNd, scale, block_size, window, mass, sampled=sampled)

    def document_scores(
        self, q_MNd: Tensor, k_MNd: Tensor, block_size: int, window: int | None, *, causal: bool, mass: bool
    ) -> Tensor:
        """One document's estimated block scores, fp32 [n]; arguments as `pair_scores`' and `scores`'.

        Sums over query blocks need only some of the distant ones. A causal score is a query block's own, masses have
        denominators, and a window has few distant ones.
        """
        sampled = window is None and not (causal or mass)
        pairs = self.pair_scores(q_MNd, k_MNd, block_size, window, mass=mass, sampled=sampled)
        return attention_informativeness(pairs, causal)

    def scores(
        self,
        hidden_ND: Tensor,
        norm: Callable[[Tensor], Tensor] | None,
        weights: NormWeights | None,
        rotate: Rotate,
        layout: SequenceLayout,
        window: int | None,
        *,
        causal: bool,
        mass: bool,
    ) -> Tensor:
        """Estimated block scores of a batch, fp32 [blocks].

        Args:
            hidden_ND: what goes into the branch's norm, of all rows of the batch.
            norm: that norm, None where there is none.
            weights: the norm's, None if they aren't known; then it runs, and no kernel.
            rotate: as `positioned`'s.
            layout: documents and blocks.
            window: sliding window in tokens, or None.
            causal: the score that looks at earlier blocks only.
            mass: what was estimated is softmax mass.
        """
        # Thresholds were chosen for scores computed so.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if projection_backend(hidden_ND, weights is not None) == "triton" and weights is not None:
                from lemo.kernels.projection import projected

                look = self._looks.of(hidden_ND.dtype, weights)
                q, k = self._placed(projected(hidden_ND, look), rotate, normed=look.heads is not None)
            else:
                q, k = self.positioned(hidden_ND if norm is None else norm(hidden_ND), rotate)
            found = [
                self.document_scores(q[:, a:b], k[:, a:b], layout.block_size, window, causal=causal, mass=mass)
                for a, b in layout.documents
            ]
            return torch.cat(found)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """All matrices [(m + g)·d, D] and biases in one."""
        sides = self.query, self.key
        return torch.cat([side.matrix.flatten(0, 1) for side in sides]), torch.cat(
            [side.bias.flatten() for side in sides]
        )

    def _head_norm(self) -> HeadNorm | None:
        """The norm of all heads, if there is one that the kernel does."""
        sides = self.query, self.key
        gains = [side.gain.flatten() for side in sides if side.gain is not None]
        eps = [float(side.eps) for side in sides if side.eps is not None]
        size = self.query.matrix.shape[1]
        if len(gains) < 2 or head_norm_backend(size, *eps) == "torch":
            return None
        from lemo.kernels.projection import HeadNorm

        return HeadNorm(torch.cat(gains).float(), size, eps[0])

    def _stack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`_affine` in a dtype; made once where they don't train."""
        held = self._stacked
        if held is None or held[0].dtype != dtype:
            matrix, bias = self._affine()
            held = matrix.to(dtype), bias.to(dtype)
            self._stacked = None if self.query.matrix.requires_grad else held
        return held


def random_heads(count: int, keys: int, head_size: int, width: int) -> ScoreHeads:
    """Heads that predict nothing, and the keys that they share as evenly as can be."""
    query, key = (HeadProjection(torch.randn(n, head_size, width), torch.zeros(n, head_size)) for n in (count, keys))
    return ScoreHeads(query, key, torch.arange(count) * keys // count)


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
    query, key = sides
    found = ScoreHeads(query, key, tensors["key_of"])
    found.load_state_dict(tensors)
    return found
