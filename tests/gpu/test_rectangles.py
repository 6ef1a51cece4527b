"""cuDNN's rectangles on a GPU: errors against fp32 no larger than our kernels' alone, at sizes that are really cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lemo.kernels import prefix, reference
from lemo.kernels.attention import attention_backward, attention_forward
from lemo.kernels.dispatch import prefix_by_library

pytestmark = pytest.mark.gpu

# Kept: a quarter of the first document evenly spread, and the end of the second.
DOCUMENTS = ((0, 20480), (20480, 36864))
ROWS = torch.cat([torch.arange(0, 20480, 4), torch.arange(20480, 30000, 8), torch.arange(30000, 36864)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "d"), [((32, 8), 128), ((9, 3), 64), ((8, 8), 80)], ids=str)
def test_errors_are_those_of_our_kernels(
    heads: tuple[int, int], d: int, dtype: torch.dtype, device: torch.device
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("rectangles are cut on Hopper only")
    generator = torch.Generator(device).manual_seed(0)

    def normal(n: int, h: int) -> Tensor:
        return torch.randn(n, h, d, generator=generator, device=device)

    M, N = DOCUMENTS[-1][1], len(ROWS)
    exact = (
        normal(N, heads[0]).transpose(0, 1),
        normal(M, heads[1]).transpose(0, 1),
        normal(M, heads[1]).transpose(0, 1),
    )
    low = tuple(x.to(dtype) for x in exact)
    grad = normal(N, heads[0])
    cu_seqlens = (0, int((DOCUMENTS[0][1] > ROWS).sum()), N)
    rows = ROWS.to(device)
    lo = torch.where(rows < DOCUMENTS[0][1], 0, DOCUMENTS[1][0]).int()
    hi, scale = rows.int(), d**-0.5
    assert prefix_by_library(low[0])
    rectangles = prefix.cut_rectangles(DOCUMENTS, cu_seqlens, ROWS, heads[0], head_rows=1024 * heads[0])
    assert len({r.key for r in rectangles}) == 2, "both documents are cut"

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
        out, lse = attention_forward(q, k, v, lo, hi, scale)
        return [out, *attention_backward(g, q, k, v, out, lse, lo, hi, scale)]

    wanted = _in_fp32(*exact, grad, lo, hi, scale)
    alone = ours(*low, grad.to(dtype))
    done = prefix.forward(*low, lo, hi, scale, rectangles)
    found = [done.out, *prefix.backward(grad.to(dtype), *low, done, hi, scale, rectangles)]
    for name, right, own, with_library in zip("oqkv", wanted, alone, found, strict=True):
        assert with_library.dtype == dtype
        errors = [float((x.float() - right).norm() / right.norm()) for x in (with_library, own)]
        assert errors[0] <= 1.3 * errors[1] + 5e-4, (name, errors)


def _in_fp32(
    q_HNd: Tensor, k_KMd: Tensor, v_KMd: Tensor, grad_NHd: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> list[Tensor]:
    """Output [N, H, d] and the gradients of queries, keys and values, some queries at a time."""
    leaves = [x.clone().requires_grad_() for x in (q_HNd, k_KMd, v_KMd)]
    outs = []
    for n in range(0, q_HNd.shape[1], 512):
        part = slice(n, n + 512)
        out = reference.attention(leaves[0][:, part], leaves[1], leaves[2], lo[part], hi[part], scale)
        out.backward(grad_NHd[part])
        outs.append(out.detach())
    return [torch.cat(outs), *(leaf.grad for leaf in leaves)]
