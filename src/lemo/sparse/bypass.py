"""The low-rank bypass: what a token left out of a branch gets in the branch's place, a linear map of its input.

Fitted in closed form (reduced-rank regression): of all maps of rank r the one whose outputs are nearest the branch's
own on a sample, in squared error. With C the covariances of the branch's input x and output y, W = (Cxx + λ)⁻¹ Cxy is
the full map; projecting its outputs on the r directions in which they vary most, the leading eigenvectors of Wᵀ Cxy,
gives the best of rank r. It costs 4·D·r operations a token, where attention's linears alone cost 5·D² (four query
heads a key head) and an MLP of width 3.5·D 21·D².

Shapes: N rows, D hidden size, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bypass(nn.Module):
    """y = B A x + bias; frozen until `SparsityConfig.train_bypass` asks for more.

    Args:
        a: A, [r, D].
        b: B, [D, r].
        bias: [D].
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.a, self.b, self.bias = (nn.Parameter(t, requires_grad=False) for t in (a, b, bias))

    @property
    def device(self) -> torch.device:
        """Where its matrices lie."""
        return self.a.device

    def forward(self, x_ND: Tensor) -> Tensor:
        """The map of a branch's input at some rows, [N, D]."""
        a, b, bias = (t.to(x_ND.dtype) for t in (self.a, self.b, self.bias))
        return F.linear(F.linear(x_ND, a), b, bias)


class BypassFit:
    """Sums over a sample, from which the map is solved; the sample itself isn't kept.

    Args:
        width: D.
        device: of the sums.
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._x, self._y, self._yy = zeros(width), zeros(width), zeros(1)[0]
        self._xx, self._xy = zeros(width, width), zeros(width, width)

    @property
    def width(self) -> int:
        """D."""
        return self._x.numel()

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Some rows' inputs and outputs of the branch."""
        x, y = x_ND.detach().float(), y_ND.detach().float()
        self.rows += x.shape[0]
        self._x += x.sum(0, dtype=torch.float64)
        self._y += y.sum(0, dtype=torch.float64)
        self._yy += y.square().sum(dtype=torch.float64)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def solve(self, rank: int, ridge: float = 1e-3) -> tuple[Bypass, float]:
        """The best map of that rank, and the share of the output's variance it explains on the sample.

        Args:
            rank: r, at least 1.
            ridge: λ as a share of the mean variance of x's coordinates, against directions the sample hardly has.

        Raises:
            ValueError: fewer than two rows were added, or a rank out of range.
        """
        if self.rows < 2:
            raise ValueError(f"a bypass needs at least 2 rows to be fitted, got {self.rows}")
        width = self._x.numel()
        if not 1 <= rank <= width:
            raise ValueError(f"rank must lie in 1 ... {width} (the hidden size), got {rank}")
        x, y = self._x / self.rows, self._y / self.rows
        cxx = self._xx / self.rows - x.outer(x)
        cxy = self._xy / self.rows - x.outer(y)
        cxx.diagonal().add_(ridge * cxx.diagonal().mean() + torch.finfo(torch.float32).tiny)
        full = torch.linalg.solve(cxx, cxy)
        seen = full.T @ cxy
        strength, directions = torch.linalg.eigh((seen + seen.T) / 2)
        b = directions[:, -rank:]
        a = (full @ b).T
        spread = self._yy / self.rows - y.square().sum()
        explained = float(strength[-rank:].sum() / spread) if spread > 0 else 1.0
        return Bypass(a.float(), b.float().contiguous(), (y - b @ (a @ x)).float()), explained
