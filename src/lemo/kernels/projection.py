"""A branch's norm and a linear map of every row of the residual stream in one pass, in Triton.

The norm's weight lies in the matrix, its scale is a factor on each row's products and comes from sums over the same
numbers, so that normalised inputs never exist. A norm of heads behind the map is done on tiles that hold heads whole.

N rows, D hidden size, r numbers a row, d head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.kernels.launches import card
from lemo.kernels.launching import launch
from lemo.kernels.tiles import tiles_of

# Tiles in flight, with the one at work.
_STAGES = 3
# Rows of a tile, columns of one of the matrix's, numbers of both a step, warps; by how many bytes a number has.
_HALF, _FULL = (128, 128, 64, 8), (64, 64, 32, 4)
# Twice the columns read half as often what lies in L2, if a program may have so much shared memory.
_WIDE_BYTES = 144 * 2**10


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm that each head goes through.

    Attributes:
        gain: of one head after the other, fp32 [r], r a multiple of d.
        size: d, a power of two up to `LARGEST_NORMED_HEAD`.
        eps: the norm's.
    """

    gain: Tensor
    size: int
    eps: float


@dataclass(frozen=True)
class FirstLook:
    """A matrix and the norm before it.

    Attributes:
        matrix: for inputs that are scaled but not shifted, in their dtype, contiguous [r, D].
        offset: what is added to the scaled products, fp32 [r].
        sums: fp32 [r], the matrix's rows summed, where the norm takes the mean away; else None.
        eps: the norm's.
        heads: the norm of heads behind the matrix, or None.
    """

    matrix: Tensor
    offset: Tensor
    sums: Tensor | None
    eps: float
    heads: HeadNorm | None = None


def projected(hidden_ND: Tensor, look: FirstLook) -> Tensor:
    """What the matrix makes of each row after its norm, heads normed where they are to be; in the rows' dtype [N, r].

    Args:
        hidden_ND: the residual stream, rows contiguous in memory.
        look: of any r.
    """
    (N, D), r = hidden_ND.shape, len(look.matrix)
    out = torch.empty(N, r, device=hidden_ND.device, dtype=hidden_ND.dtype)
    precise, centered = hidden_ND.dtype == torch.float32, look.sums is not None
    rows, columns, step, warps = _FULL if precise else _HALF
    # Not where half of the last tile would lie beyond the matrix.
    if not precise and tiles_of(r, columns) % 2 == 0 and card(hidden_ND.device)[1] >= _WIDE_BYTES:
        columns *= 2
    gain, size, head_eps = None, 0, 0.0
    if (heads := look.heads) is not None:
        gain, size, head_eps = heads.gain, heads.size, heads.eps
        assert r % size == 0, "heads are whole"
        columns = max(columns, size)
    launch(
        _project, (tiles_of(N, rows) * tiles_of(r, columns),), hidden_ND, look.matrix, look.offset, look.sums, gain,
        out, look.eps, head_eps, N, hidden_ND.stride(0), D=D, R=r, HEAD=size, BM=rows, BN=columns, BK=step,
        CENTERED=centered, PRECISION="ieee" if precise else "tf32", num_warps=warps, num_stages=_STAGES,
    )  # fmt: skip
    return out


@triton.jit
def _project(
    X, MATRIX, OFFSET, SUMS, GAIN, OUT,
    eps, head_eps, N, stride,
    D: tl.constexpr, R: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CENTERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs of the same rows run next to each other, which find them in L2.
    across: tl.constexpr = (R + BN - 1) // BN
    program = tl.program_id(0)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    i += program // across * BM
    j += program % across * BN
    # Beyond the last one it's the last again: loads without masks are copies that run ahead.
    row, column = tl.minimum(i, N - 1).to(tl.int64), tl.minimum(j, R - 1)
    rows = X + row[:, None] * stride + k[None, :]
    matrix = MATRIX + column[None, :] * D + k[:, None]
    products = tl.zeros([BM, BN], tl.float32)
    # Eight neighbours lie in one thread.
    total, squares = tl.zeros([BM, BK // 8], tl.float32), tl.zeros([BM, BK // 8], tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            x = tl.load(rows + start, cache_modifier=".cg")
            w = tl.load(matrix + start)
        else:
            x = tl.load(rows + start, mask=(k < D - start)[None, :], other=0.0, cache_modifier=".cg")
            w = tl.load(matrix + start, mask=(k < D - start)[:, None], other=0.0)
        products = tl.dot(x, w, products, input_precision=PRECISION)
        # Loaded once more, from L2: a tile that is summed as well as multiplied gets a buffer too few, and copies
        # overwrite it while products on it run (Triton 3.6). The other modifier keeps the two loads apart.
        if D % BK == 0:
            again = tl.load(rows + start)
        else:
            again = tl.load(rows + start, mask=(k < D - start)[None, :], other=0.0)
        wide = tl.reshape(again.to(tl.float32), [BM, BK // 8, 8])
        squares += tl.sum(wide * wide, 2)
        if CENTERED:
            total += tl.sum(wide, 2)
    variance = tl.sum(squares, 1) / D
    if CENTERED:
        mean = tl.sum(total, 1) / D
        variance = tl.maximum(variance - mean * mean, 0.0)
        products -= mean[:, None] * tl.load(SUMS + column)[None, :]
    scale = 1 / tl.sqrt(variance + eps)
    y = products * scale[:, None] + tl.load(OFFSET + column)[None, :]
    if HEAD > 0:
        heads = tl.reshape(y, [BM, BN // HEAD, HEAD])
        head_scale = 1 / tl.sqrt(tl.sum(heads * heads, 2) / HEAD + head_eps)
        y = tl.reshape(heads * head_scale[:, :, None], [BM, BN]) * tl.load(GAIN + column)[None, :]
    out = OUT + i.to(tl.int64)[:, None] * R + j[None, :]
    tl.store(out, y.to(OUT.dtype.element_ty), mask=(i < N)[:, None] & (j < R)[None, :])
