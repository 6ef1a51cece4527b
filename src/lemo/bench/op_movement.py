"""Operations on rows of the residual stream, by the kernels, by their twins, and the naive way.

Bytes are what each implementation must at least read and write, of T·D numbers (u) of which a share k is kept:

| operation | kernels | naive | of which |
|---|---|---|---|
| read and norm | 2 k | 4 k | index 2 k, fused norm 2 k |
| add | 3 k | 4 + 2 k | zeros 1, scatter 2 k, addition 3 |
| read, norm, add | 5 k | 4 + 6 k | |
| read, add (the paper's) | 5 k | 4 + 4 k | |
| backward | 6 k | 4 + 8 k | the gradient's rows 2 k, the norm's 3 k, zeros 1, scatter-add 3 k, addition 3 |
| copy | | | torch's, of as many rows that lie together, 2 k: what a card makes of so few bytes |

Shapes: T tokens, D width, N kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.bench.op import Op
from lemo.bench.ops_config import MovementOps
from lemo.kernels import reference
from lemo.kernels.dispatch import movement_backend

_EPS = 1e-5


@dataclass
class _Tensors:
    """What is moved.

    Attributes:
        x, grad: a stream and its gradient, [T, D].
        rows: kept ones, int64 [N].
        y, grad_y: a branch's output, and the gradient of its normalised input, [N, D].
        kept: the rows of x, as a forward keeps them for its backward, [N, D].
        weight: a norm's, [D].
    """

    x: Tensor
    rows: Tensor
    y: Tensor
    kept: Tensor
    weight: Tensor
    grad: Tensor
    grad_y: Tensor


# Given tensors, a call; what it returns is the same for all implementations of an operation.
_Call = Callable[[_Tensors], Callable[[], tuple[Tensor, ...]]]


def movement_ops(settings: MovementOps, dtype: torch.dtype, device: str) -> Iterator[Op]:
    """Every operation by every implementation that runs on the device."""
    for T in settings.lengths:
        for keep in settings.keeps:
            rows = kept_rows(T, keep, settings.block_size)
            k, D = len(rows) / T, settings.width
            unit = float(T * D * dtype.itemsize)
            for op, calls, sizes in _ALL:
                for implementation, call in calls.items():
                    if implementation == "kernels" and movement_backend(torch.empty(0, D, device=device)) != "triton":
                        continue
                    yield Op(
                        op=f"movement: {op}",
                        implementation=implementation,
                        shape=f"width {D:,}",
                        T=T,
                        keep=k,
                        prepare=_preparation(call, T, D, rows, dtype, device),
                        bytes=unit * sizes["naive" if implementation == "naive" else "kernels"](k),
                    )


def kept_rows(T: int, keep: float, block_size: int) -> Tensor:
    """Rows of blocks drawn at random, ascending; the first and the last block are always kept."""
    blocks = -(-T // block_size)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, blocks - 1]).unique()
    rest = order[~torch.isin(order, edges)]
    kept = torch.zeros(blocks, dtype=torch.bool)
    kept[torch.cat([edges, rest[: max(0, round(keep * blocks) - len(edges))]])] = True
    return kept.repeat_interleave(block_size)[:T].nonzero()[:, 0]


def _preparation(
    call: _Call,
    T: int,
    D: int,
    rows: Tensor,
    dtype: torch.dtype,
    device: str,
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        # What is added to again and again stays small.
        x = normal(T, D)
        given = _Tensors(
            x=x,
            rows=rows.to(device),
            kept=x[rows.to(device)],
            y=1e-3 * normal(len(rows), D),
            weight=1 + 0.1 * normal(D),
            grad=normal(T, D),
            grad_y=1e-3 * normal(len(rows), D),
        )
        return call(given)

    return prepare


def _kernels() -> ModuleType:
    from lemo.kernels import movement

    return movement


def _by(ops: Callable[[], ModuleType], *parts: str) -> _Call:
    """Parts one after the other: `read`, `norm`, `add`, `back`."""

    def prepared(t: _Tensors) -> Callable[[], tuple[Tensor, ...]]:
        module = ops()

        def run() -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            if "read" in parts:
                found.append(module.gather_rows(t.x, t.rows))
            if "norm" in parts:
                found.append(module.gather_norm(t.x, t.rows, t.weight, None, _EPS, centered=False, dtype=t.x.dtype)[0])
            if "add" in parts:
                module.add_rows_(t.x, t.rows, t.y)
                found.append(t.x)
            if "back" in parts:
                found.append(module.gather_rows(t.grad, t.rows))
                module.add_norm_gradient_(t.grad, t.rows, t.grad_y, t.kept, t.weight, _EPS, centered=False)
                found.append(t.grad)
            return tuple(found)

        return run

    return prepared


def _naive(*parts: str) -> _Call:
    """Index, norm by torch's fused kernel, zeros, scatter, add."""

    def prepared(t: _Tensors) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            if "read" in parts:
                found.append(t.x.index_select(0, t.rows))
            if "norm" in parts:
                found.append(F.rms_norm(t.x.index_select(0, t.rows), t.weight.shape, t.weight, _EPS))
            if "add" in parts:
                found.append(t.x + torch.zeros_like(t.x).index_copy_(0, t.rows, t.y))
            return tuple(found)

        return run

    return prepared


def _naive_backward(t: _Tensors) -> Callable[[], tuple[Tensor, ...]]:
    """Autograd's, of the naive forward with an identity for a branch's products."""
    x, y = t.x.requires_grad_(), t.y.requires_grad_()
    normed = F.rms_norm(x.index_select(0, t.rows), t.weight.shape, t.weight, _EPS)
    out = x + torch.zeros_like(x).index_copy(0, t.rows, y)

    def run() -> tuple[Tensor, ...]:
        along, of_branch = torch.autograd.grad(out, (x, y), t.grad, retain_graph=True)
        (through,) = torch.autograd.grad(normed, x, t.grad_y, retain_graph=True)
        return of_branch, along + through

    return run


def _copy(t: _Tensors) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (t.kept.copy_(t.y),)


def _three(*parts: str) -> dict[str, _Call]:
    return {"kernels": _by(_kernels, *parts), "twin": _by(lambda: reference, *parts), "naive": _naive(*parts)}


_ALL = (
    ("read and norm", _three("norm"), {"kernels": lambda k: 2 * k, "naive": lambda k: 4 * k}),
    ("add", _three("add"), {"kernels": lambda k: 3 * k, "naive": lambda k: 4 + 2 * k}),
    ("read, norm, add", _three("norm", "add"), {"kernels": lambda k: 5 * k, "naive": lambda k: 4 + 6 * k}),
    ("read, add", _three("read", "add"), {"kernels": lambda k: 5 * k, "naive": lambda k: 4 + 4 * k}),
    (
        "backward",
        {"kernels": _by(_kernels, "back"), "twin": _by(lambda: reference, "back"), "naive": _naive_backward},
        {"kernels": lambda k: 6 * k, "naive": lambda k: 4 + 8 * k},
    ),
    ("copy", {"torch": _copy}, {"kernels": lambda k: 2 * k}),
)
