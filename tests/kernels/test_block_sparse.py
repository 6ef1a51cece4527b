"""Block-sparse attention against its twin in fp64: values, every gradient, all rows and some, no memory unwritten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import DEVICE, DTYPES, HEADS, error, poisoned

from lemo.config import Attend
from lemo.kernels import reference
from lemo.kernels.dispatch import block_sparse_backend, check_listed_block
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout

pytest.importorskip("triton")
from lemo.kernels import block_sparse as kernels
from lemo.kernels.launches import Launch, Launches

BATCHES: dict[str, dict[str, Any]] = {
    "one": {"batch": 1, "length": 230},
    "whole blocks": {"batch": 1, "length": 192},
    "shorter than a block": {"batch": 1, "length": 11},
    "two": {"batch": 2, "length": 110},
    "padding": {
        "batch": 2,
        "length": 130,
        "attention_mask": torch.stack([torch.arange(130) >= 21, torch.arange(130) < 103]).long(),
    },
    "packed": {
        "batch": 1,
        "length": 230,
        "position_ids": torch.cat([torch.arange(n) for n in (27, 16, 150, 37)])[None],
    },
}
# More heads than a tile has lanes, where few rows are kept.
GROUPS = {**HEADS, "many": (40, 1)}
CHOICES: dict[str, dict[str, Any]] = {
    "random": {"choice": "random", "density": 0.6},
    "sampled": {"choice": "sampled", "density": 0.6},
    "one window block": {"choice": "random", "density": 0.55, "window": 1},
    "window": {"choice": "none", "density": 0.5},
    "everything": {"choice": "random", "density": 1.0},
    "some dense": {"choice": "sampled", "density": 0.4, "labelled": "dense"},
}


def some_rows(layout: Any, which: str) -> torch.Tensor | None:
    """Kept rows: none given, scattered ones, few, or a stretch; real ones only."""
    real = (layout.on_host.block_of_row >= 0).nonzero().flatten()
    n = torch.arange(len(real))
    keep = {
        "all": None,
        "scattered": (n * 7919 % 5) < 2,
        "few": n % 29 == 3,
        "end": n >= len(n) - 40,
        "none": n < 0,
    }[which]
    return None if keep is None else real[keep]


def draw(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Heads as strides of a projection, [heads, rows, d]; the last, a gradient, [rows, heads, d]."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, h, d, generator=generator).to(DEVICE, dtype) for h, n, d in shapes]
    return [*(x.transpose(0, 1) for x in drawn[:-1]), drawn[-1]]


def exact(q: Any, k: Any, v: Any, grad: Any, bias: torch.Tensor, scale: float, dtype: torch.dtype) -> list[Any]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = reference.block_sparse_attention(*leaves, bias, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def lists_of(batch: str, choice: dict[str, Any], heads: int, window: int | None, block: int = 16) -> Any:
    given = {key: x.to(DEVICE) if torch.is_tensor(x) else x for key, x in BATCHES[batch].items()}
    layout = build_layout(block_size=16, device=torch.device(DEVICE), **given)
    labelled = torch.arange(layout.rows) % 90 == 80 if "labelled" in choice else None
    attend = build_grid(layout, Attend(**choice, block=block), heads, window, labelled)
    some = torch.randn(heads, layout.rows, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return layout, choose_blocks(attend, some, some, 1.0, lambda: 5)


def check(
    monkeypatch: pytest.MonkeyPatch,
    batch: str,
    choice: str = "random",
    which: str = "all",
    heads: str = "grouped",
    d: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    block: int = 16,
) -> None:
    H, K = GROUPS[heads]
    layout, lists = lists_of(batch, CHOICES[choice], K, window, block)
    host_rows = some_rows(layout, which)
    rows = torch.arange(layout.rows) if host_rows is None else host_rows
    N, M = len(rows), layout.rows
    q, k, v, grad = draw(((H, N, d), (K, M, d), (K, M, d), (H, N, d)), dtype)
    scale = d**-0.5
    bias = lists.bias(rows.to(DEVICE), 0, M)
    wanted = exact(q, k, v, grad, bias, scale, torch.float64)
    plain = exact(q, k, v, grad, bias, scale, dtype)
    poisoned(monkeypatch)
    queries = kernels.Queries(lists, host_rows)
    out, lse = kernels.block_sparse_forward(q, k, v, queries, scale)
    found = [out, *kernels.block_sparse_backward(grad, q, k, v, out, lse, queries, scale)]
    for name, mine, right, low in zip(("o", "q", "k", "v"), found, wanted, plain, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert torch.isfinite(mine).all(), name
        if not N:
            assert not mine.any()
            continue
        # No worse than plain attention in the same precision.
        limit = error(low, right, grad) + {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert error(mine, right, grad) <= limit, f"{name}: {error(mine, right, grad):.2e} over {limit:.2e}"


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("batch", BATCHES)
def test_all_rows(batch: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, batch, choice)


@pytest.mark.parametrize("choice", ["random", "sampled", "some dense"])
@pytest.mark.parametrize("which", ["scattered", "few", "end", "none"])
@pytest.mark.parametrize("batch", ["one", "padding", "packed"])
def test_some_rows(batch: str, which: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, batch, choice, which)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["all", "scattered"])
@pytest.mark.parametrize("window", [1, 45, 1000])
@pytest.mark.parametrize("batch", ["one", "packed"])
def test_sliding_windows(
    batch: str, window: int, which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(monkeypatch, batch, "one window block", which, dtype=dtype, window=window)


@pytest.mark.parametrize("which", ["all", "scattered"])
@pytest.mark.parametrize("window", [45, 100])
def test_weights_in_sliding_windows(window: int, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "packed", "sampled", which, window=window)


@pytest.mark.parametrize("d", [8, 40, 64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_head_size_and_grouping(heads: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "packed", "random", "scattered", heads, d, DTYPES[-1])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_all_rows_of_any_grouping(heads: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "packed", "one window block", "all", heads, block=block)


@pytest.mark.parametrize("which", ["few", "scattered", "all"])
def test_many_heads_share_a_key_head(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "packed", "random", which, "many", d=8)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_any_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "one", "one window block", "all", dtype=DTYPES[-1], d=64, block=block)


@pytest.mark.parametrize("choice", ["random", "sampled", "some dense"])
def test_a_short_last_block_that_chose(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tiles fill blocks, only a document's last one needs a look at its end."""
    monkeypatch.setitem(BATCHES, "long", {"batch": 1, "length": 424})
    _, lists = lists_of("long", CHOICES[choice], 2, None, 32)
    grid = lists.grid
    assert grid.query_end[-1] - grid.query_first[-1] == 40 < grid.longest == 64
    assert grid.chosen[-1]
    if choice == "sampled":
        last, slots = (torch.tensor(x, device=DEVICE) for x in ([len(grid.chosen) - 1], range(grid.chosen[-1])))
        boosts = lists.boosts(last, slots)
        assert boosts is not None
        assert boosts.any()
    check(monkeypatch, "long", choice, block=32)


@pytest.mark.parametrize(
    ("batch", "which", "d", "block", "lies"),
    [
        ("padding", "all", 16, 16, "well"),
        ("packed", "all", 40, 32, "well"),
        ("packed", "scattered", 16, 16, "well"),
        ("packed", "all", 16, 16, "between"),
        ("packed", "all", 16, 16, "apart"),
        ("packed", "all", 20, 16, "at odds"),
    ],
)
def test_tiles_copied_by_the_hardware(
    batch: str, which: str, d: int, block: int, lies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory begins between multiples of 16 bytes, a row's numbers lie apart, or rows begin so, threads load."""
    used: list[bool] = []

    def launches(x: torch.Tensor, *_: Any) -> Launches:
        return Launches(*[Launch(64, 64, 4, 2, tma=True)] * 3)

    def descriptors(*given: Any) -> Any:
        found = make(*given)
        used.append(found is not None)
        return found

    def drawn(*given: Any) -> list[torch.Tensor]:
        return [moved(x) for x in usual(*given)]

    def moved(x: torch.Tensor) -> torch.Tensor:
        if lies in ("well", "at odds"):
            return x
        wide = torch.empty(*x.shape[:2], 2 * x.shape[2], device=x.device, dtype=x.dtype)
        part = wide[..., 1 : x.shape[2] + 1] if lies == "between" else wide[..., ::2]
        return part.copy_(x)

    make, usual = kernels._descriptors, draw
    monkeypatch.setattr(kernels, "_descriptors", descriptors)
    monkeypatch.setattr(kernels, "_launches", launches)
    monkeypatch.setitem(globals(), "draw", drawn)
    for choice in ("sampled", "window"):
        check(monkeypatch, batch, choice, which, d=d, dtype=DTYPES[-1], block=block)
    # With blocks of 32 a block's rows fill tiles of one head, which alone are copied for the gradient of keys.
    assert used == [lies == "well"] * 6


def test_results_repeat_bit_by_bit() -> None:
    _, lists = lists_of("packed", CHOICES["random"], 2, None)
    queries = kernels.Queries(lists, None)
    q, k, v, grad = draw(((6, 230, 16), (2, 230, 16), (2, 230, 16), (6, 230, 16)), torch.float32)
    runs = []
    for _ in range(2):
        out, lse = kernels.block_sparse_forward(q, k, v, queries, 0.25)
        runs.append([out, *kernels.block_sparse_backward(grad, q, k, v, out, lse, queries, 0.25)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_kernel_cant_do_is_torchs_on_a_cpu_and_an_error_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(d: int, key_block: int, dtype: torch.dtype = torch.float16) -> str:
        # Of a tensor only this is looked at, so no GPU is needed.
        x: Any = SimpleNamespace(
            device=torch.device(device), shape=(2, 8, d), dtype=dtype, element_size=lambda: dtype.itemsize
        )
        return block_sparse_backend(x, x, x, key_block)

    usual = "triton" if device == "cuda" else "torch"
    assert backend(128, 128) == backend(256, 64) == backend(128, 64, torch.float32) == usual
    cant: list[tuple[Any, ...]] = [(256, 128), (256, 64, torch.float32), (64, 48), (64, 64, torch.float64)]
    for arguments in cant:
        if device == "cuda":
            with pytest.raises(ValueError, match="plain torch on this GPU"):
                backend(*arguments)
            with monkeypatch.context() as context:
                context.setenv("LEMO_KERNELS", "torch")
                assert backend(*arguments) == "torch"
        else:
            assert backend(*arguments) == "torch"
    check_listed_block(48, torch.device("cpu"))
    check_listed_block(64, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"16, 32, 64, 128 keys, not 48. Change sparsity\.attend\.block"):
        check_listed_block(48, torch.device("cuda"))


def test_lists_are_obeyed() -> None:
    """Keys outside a query's lists change nothing, keys inside do: the masks above aren't everything."""
    _, lists = lists_of("one", CHOICES["random"], 2, None)
    seen = lists.bias(torch.arange(230, device=DEVICE), 0, 230) > float("-inf")
    causal = torch.ones(230, 230, device=DEVICE, dtype=torch.bool).tril()
    assert (seen <= causal).all()
    assert not torch.equal(seen[0], seen[1]), "both heads drew the same"
    assert 0.5 < seen.sum() / (2 * causal.sum()) < 0.6
    q, k, v, _ = draw(((2, 230, 16), (2, 230, 16), (2, 230, 16), (1, 1, 1)), torch.float32)
    run = [kernels.block_sparse_forward(q, k, v, kernels.Queries(lists, None), 0.25)[0]]
    unseen = ~seen[:, 220]
    moved = k + 7.0 * unseen[..., None]
    run.append(kernels.block_sparse_forward(q, moved, v, kernels.Queries(lists, None), 0.25)[0])
    assert torch.equal(run[0][220], run[1][220])
    assert not torch.equal(run[0][190], run[1][190])
