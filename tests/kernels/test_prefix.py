"""Rectangles of attention given to a library: where they are cut, and that the parts are the whole.

On a CPU the library's place is taken by its plain twin; `gpu/test_rectangles.py` runs cuDNN.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_attention import DEVICE, causal, draw, error, every_block, exact, poisoned

pytest.importorskip("triton")
from lemo.kernels import prefix, reference
from lemo.kernels.prefix import Rectangle, cut_rectangles

SMALL = {"head_rows": 6 * 16, "least_keys": 32, "grain": 16}
CASES = {
    "one document": (torch.arange(0, 300, 2), 300, ((0, 300),)),
    "blocks": (every_block(400, 16, 3), 400, ((0, 400),)),
    "late": (torch.cat([torch.arange(0, 200, 9), torch.arange(200, 333)]), 333, ((0, 333),)),
    "documents": (every_block(500, 16, 2), 500, ((0, 50), (50, 230), (230, 500))),
    "padding": (torch.arange(20, 190, 2), 260, ((20, 190),)),
    "too short": (torch.arange(0, 40), 40, ((0, 40),)),
}


def seqlens(rows, documents):
    return [0, *(int((rows < end).sum()) for _, end in documents)]


@pytest.mark.parametrize("case", CASES)
def test_every_query_of_a_rectangle_sees_all_its_keys_and_more(case):
    rows, _, documents = CASES[case]
    cu_seqlens = seqlens(rows, documents)
    found = cut_rectangles(documents, cu_seqlens, rows, 6, **SMALL)
    assert bool(found) == (case != "too short")
    ends = [0, *(r.row_end for r in found)]
    for r, before in zip(found, ends, strict=False):
        assert before <= r.row < r.row_end == r.row + 16
        document = next(i for i, (a, b) in enumerate(pairwise(cu_seqlens)) if a <= r.row < b)
        assert r.row_end <= cu_seqlens[document + 1]
        assert r.key == documents[document][0]
        assert r.key_end - r.key >= 32
        assert (r.key_end - r.key) % 16 == 0
        # Not the query's own key: the strip along the diagonal is never empty.
        assert r.key_end <= int(rows[r.row])


def test_shapes_are_few_however_long_the_sequence():
    for T in (2**17, 2**20):
        rows = torch.arange(0, T, 4)
        found = cut_rectangles(((0, T),), (0, len(rows)), rows, 32)
        covered = sum((r.row_end - r.row) * (r.key_end - r.key) for r in found)
        assert covered >= 0.9 * float((rows + 1).sum())
        assert len({r.row_end - r.row for r in found}) == 1
        assert len({r.key_end for r in found}) <= 16 * (T.bit_length() - 14)


@pytest.mark.parametrize(
    ("case", "dtype", "heads"),
    [
        *((case, torch.float32, (6, 2)) for case in CASES),
        *(("documents", torch.float16, heads) for heads in ((6, 2), (6, 6), (6, 1))),
    ],
    ids=str,
)
@pytest.mark.skipif(DEVICE == "cuda", reason="cuDNN takes other sizes")
def test_parts_are_the_whole(case, dtype, heads, monkeypatch):
    rows, keys, documents = CASES[case]
    rectangles = cut_rectangles(documents, seqlens(rows, documents), rows, heads[0], **SMALL)
    lo, hi = causal(rows, documents)
    q, k, v, grad = draw(rows, keys, heads, 16, dtype)
    wanted = exact(q, k, v, grad, lo, hi, 0.25)
    plain = exact(q, k, v, grad, lo, hi, 0.25, dtype)
    poisoned(monkeypatch)
    done = prefix.forward(q, k, v, lo, hi, 0.25, rectangles)
    grads = prefix.backward(grad, q, k, v, done, hi, 0.25, rectangles)
    for name, found, right, low in zip("oqkv", (done.out, *grads), wanted, plain, strict=True):
        assert found.dtype == dtype
        limit = error(low, right, grad) + {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
        assert error(found, right, grad) <= limit, name
    assert torch.equal(lo, causal(rows, documents)[0]), "the bounds were changed in place"


def test_the_twin_gives_a_parts_share():
    q, k, v, grad = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 7, 7, 5))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole = (q @ k.transpose(1, 2) * 0.3).softmax(-1) @ v
    wanted = torch.autograd.grad(whole, leaves, grad)
    lse = (q @ k.transpose(1, 2) * 0.3).logsumexp(-1).detach()
    q, k, v = (x.detach() for x in leaves)
    parts = [
        reference.PlainAttention.backward(grad, q, k[:, s], v[:, s], whole.detach(), lse, None, 0.3)
        for s in (slice(0, 3), slice(3, 7))
    ]
    found = (parts[0][0] + parts[1][0], *(torch.cat([parts[0][i], parts[1][i]], 1) for i in (1, 2)))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_rectangle_is_what_it_says():
    assert cut_rectangles(((0, 100),), (0, 50), torch.arange(50, 100), 1, head_rows=20, least_keys=32, grain=16) == (
        Rectangle(10, 30, 0, 48),
        Rectangle(30, 50, 0, 80),
    )
