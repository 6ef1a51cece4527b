"""MLPs' predictor of informativeness (paper section 4.3): three low-rank matrices with ReLU estimate each token's
activity, whose mean over a block is the block's.

The paper's predictors see means of blocks' inputs, taken before any matrix: docs/decisions/0009 says why not.
Attention's predictors are score heads (`lemo.selection.score_heads`).

They are trained by `lemo.selection.predictor_training`, where they shrink (`lemo.selection.elastic`).

Shapes: N rows, D hidden size, n blocks of one document, r and m the rows of the first two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.kernels.dispatch import prediction_backend
from lemo.selection.first_looks import FirstLooks
from lemo.selection.score_heads import ScoreHeads
from lemo.selection.scores import mlp_informativeness, previous_blocks
from lemo.types import NormWeights, SequenceLayout


@dataclass(frozen=True)
class _Ready:
    """The matrices in one dtype.

    Attributes:
        first, bias: the first, for inputs as they come, [r, D] and [r].
        second, third: [r, m] and [m]; what comes out of the third is in the scores' unit.
    """

    first: Tensor
    bias: Tensor
    second: Tensor
    third: Tensor


class ActivityPredictor(nn.Module):
    """The MLP's mean activity.

    Args:
        width: D.
        widths: rows of the first two matrices; the third has one.

    Attributes:
        matrices: as wide as training left them.
        center, spread: mean and standard deviation of each input on the sample, [D].
        scale: mean of the exact scores on the sample.
    """

    center: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs, outputs = (width, *widths), (*widths, 1)
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(out, into) / math.sqrt(into / 2), requires_grad=False)
            for into, out in zip(inputs, outputs, strict=True)
        )
        # The output begins over zero: one that is zero for every input would never learn.
        self.matrices[-1].data.abs_()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("scale", torch.tensor(1.0))
        self._ready: _Ready | None = None
        self._looks = FirstLooks(self._affine)

    def forget(self) -> None:
        """Drops what was made from the matrices, which have changed."""
        self._ready = None
        self._looks.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def numbers(self) -> int:
        """What the first matrix makes of a token."""
        return self.matrices[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where its matrices lie."""
        return self.center.device

    @property
    def size(self) -> int:
        """Numbers in the matrices."""
        return sum(p.numel() for p in self.parameters())

    def activity(self, x_ND: Tensor) -> Tensor:
        """Estimated activity of each token of normalised inputs, [N]."""
        ready = self._in(x_ND.dtype)
        low = torch.relu(F.linear(x_ND, ready.first, ready.bias))
        return torch.relu(torch.relu(low @ ready.second) @ ready.third)

    def by_kernel(self, hidden_ND: Tensor, norm: NormWeights, layout: SequenceLayout) -> Tensor:
        """Means over the batch's blocks, from the residual stream, fp32 [blocks].

        Args:
            hidden_ND: what goes into the branch's norm, [B·T, D].
            norm: that norm.
            layout: documents and blocks.
        """
        from lemo.kernels.prediction import mean_activity

        ready, look = self._in(hidden_ND.dtype), self._looks.of(hidden_ND.dtype, norm)
        where = (layout.first_row_of_block, layout.block_tokens, layout.block_size)
        return mean_activity(hidden_ND, look, ready.second, ready.third, *where)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """What the first layer does to a normalised input before its ReLU, [r, D] and [r]."""
        first = self.matrices[0] / self.spread
        return first, -(first @ self.center)

    @torch.no_grad()
    def _in(self, dtype: torch.dtype) -> _Ready:
        """Made once for a dtype and device."""
        held = self._ready
        if held is None or held.first.dtype != dtype or held.first.device != self.device:
            first, bias = self._affine()
            second, third = self.matrices[1].T.contiguous(), self.matrices[2][0] * self.scale
            held = self._ready = _Ready(*(x.to(dtype) for x in (first, bias, second, third)))
        return held


# Of one branch of one layer.
Predictor = ScoreHeads | ActivityPredictor


def activity_predictor_of(tensors: dict[str, Tensor]) -> ActivityPredictor:
    """A predictor of a state dict.

    Raises:
        KeyError, RuntimeError: tensors are missing, or of other shapes.
    """
    widths = [tensors[f"matrices.{index}"].shape[0] for index in range(2)]
    found = ActivityPredictor(tensors["center"].numel(), widths)
    found.load_state_dict(tensors)
    return found


def predicted_scores(
    predictor: ActivityPredictor,
    hidden_ND: Tensor,
    norm: Callable[[Tensor], Tensor] | None,
    weights: NormWeights | None,
    layout: SequenceLayout,
    causal: bool,
) -> Tensor:
    """Estimated block scores of a batch, fp32 [blocks].

    Args:
        predictor: of the MLP.
        hidden_ND: what goes into the branch's norm, [B·T, D].
        norm: that norm, None where there is none.
        weights: the norm's, None if they aren't known; then it runs, and no kernel.
        layout: documents and blocks.
        causal: the score that looks at earlier blocks only.
    """
    backend = prediction_backend(hidden_ND, layout.block_size, predictor.numbers, weights is not None)
    # Thresholds were chosen for scores computed so.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if backend == "triton" and weights is not None:
            score = predictor.by_kernel(hidden_ND, weights, layout)
            return previous_blocks(score, layout) if causal else score
        activity = predictor.activity(hidden_ND if norm is None else norm(hidden_ND))
        wide = activity.to(torch.promote_types(activity.dtype, torch.float32))
        return mlp_informativeness(wide, layout, causal)
