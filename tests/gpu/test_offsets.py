"""Offsets past 2³¹ elements: T·D of a very long sequence, and keys as many (DESIGN 4.10)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lemo

pytest.importorskip("triton")
from lemo.config import Attend
from lemo.kernels import movement
from lemo.kernels.attention import attention_backward, attention_forward
from lemo.kernels.block_sparse import Queries, block_sparse_backward, block_sparse_forward
from lemo.kernels.rotary import rotate
from lemo.selection.attend import build_grid, choose_blocks
from lemo.selection.layout import build_layout


def needs(gib: int) -> None:
    # What other tests left in torch's cache isn't free.
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.gpu
def test_kernels_reach_the_last_of_over_2_31_elements(device: torch.device) -> None:
    needs(30)
    K, d, N, seen = 8, 128, 128, 256
    M = 2**31 // (K * d) + seen
    # Of each key head 2³¹ / 8 elements, of a row's stride K·d: the last rows begin past 2³¹.
    k, v = (torch.empty(M, K, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    generator = torch.Generator(device).manual_seed(0)
    for x in (k, v):
        x[:-seen] = float("nan")  # whoever reads another row than the last ones shows it
        x[-seen:] = torch.randn(seen, K, d, generator=generator, device=device)
    q, grad = (torch.randn(N, K, d, generator=generator, device=device).to(torch.bfloat16) for _ in range(2))
    hi = torch.arange(M - N, M, device=device).int()
    lo = torch.full_like(hi, M - seen)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    near = [heads[0], *(x[:, -seen:] for x in heads[1:])]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int) -> list[torch.Tensor]:
        bounds = (lo - first, hi - first)
        out, lse = attention_forward(q, k, v, *bounds, d**-0.5)
        return [out, *attention_backward(grad, q, k, v, out, lse, *bounds, d**-0.5)]

    wanted = run(*near, M - seen)
    out, dq, dk, dv = run(*heads, 0)
    for found, right in ((out, wanted[0]), (dq, wanted[1]), (dk[:, -seen:], wanted[2]), (dv[:, -seen:], wanted[3])):
        torch.testing.assert_close(found, right, rtol=0, atol=0)
    assert not dk[:, :-seen].any()
    assert not dv[:, :-seen].any()


@pytest.mark.gpu
def test_a_rotation_reaches_gradients_whose_heads_lie_over_2_31_numbers_apart(device: torch.device) -> None:
    needs(16)
    H, d, last = 32, 128, 8
    N = 2**31 // ((H - 1) * d) + last
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.empty(H, N, d, device=device, dtype=torch.bfloat16)
    grad[:, :-last] = float("nan")  # whoever reads another row than the last ones shows it
    grad[:, -last:] = torch.randn(H, last, d, generator=generator, device=device)
    cos, sin = torch.randn(2, N, d, generator=generator, device=device, dtype=torch.bfloat16)
    rows = torch.arange(N, device=device)
    by_row = grad.transpose(0, 1)
    found = rotate(by_row, by_row[:, :1], cos, sin, rows, transposed=True)
    near = by_row[-last:]
    wanted = rotate(near, near[:, :1], cos, sin, rows[-last:], transposed=True)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[-last:], right, rtol=0, atol=0)


@pytest.mark.parametrize("every", [1, 32])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("heads", "d", "before"),
    [((6, 2), 16, 200), pytest.param((16, 8), 128, 2**31 // (8 * 128), marks=pytest.mark.gpu)],
    ids=["small", "past 2^31"],
)
def test_lists_reach_the_last_of_over_2_31_elements(
    heads: tuple[int, int], d: int, before: int, block: int, every: int, device: torch.device
) -> None:
    """A document behind one of 2³¹ / (K·d) rows that are NaN: its rows of q, k, v, their gradients and the output begin
    past 2³¹ elements (those of q past 2³²), and its results are bitwise those of the document alone."""
    (H, K), seen = heads, 400
    if device.type == "cuda":
        needs(60)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    M = before + seen
    generator = torch.Generator(device).manual_seed(0)

    def behind(heads: int) -> torch.Tensor:
        x = torch.empty(M, heads, d, device=device, dtype=dtype)
        x[:before] = float("nan")  # whoever reads another document's rows shows it
        x[before:] = torch.randn(seen, heads, d, generator=generator, device=device)
        return x

    q, k, v, grad = (behind(h) for h in (H, K, K, H))

    def run(first: int) -> list[torch.Tensor]:
        """(out, dq, dk, dv) of the last document's rows, with what lies before row `first` cut off."""
        lengths = [n for n in (before - first, seen) if n]
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
        layout = build_layout(1, M - first, 64, device, None, positions)
        grid = build_grid(layout, Attend(density=None, window=block, choice="none", block=block), K, None)
        rows = None if every == 1 else torch.arange(before - first, M - first, every)
        mine, gradient = [x[first:].transpose(0, 1) for x in (q, k, v)], grad[first:]
        if rows is not None:
            mine[0], gradient = mine[0][:, rows.to(device)], gradient[rows.to(device)]
        queries = Queries(choose_blocks(grid, mine[0], mine[1], 1.0), rows)
        out, lse = block_sparse_forward(*mine, queries, d**-0.5)
        dq, dk, dv = block_sparse_backward(gradient, *mine, out, lse, queries, d**-0.5)
        n = len(range(0, seen, every))
        return [x.clone() for x in (out[-n:], dq[:, -n:], dk[:, -seen:], dv[:, -seen:])]

    far, near = run(0), run(before)
    for found, right in zip(far, near, strict=True):
        assert right.isfinite().all()
        assert right.any()
        assert torch.equal(found, right)


@pytest.mark.gpu
def test_movement_reaches_the_last_of_over_2_31_numbers(device: torch.device) -> None:
    needs(16)
    D, last = 4096, 64
    T = 2**31 // D + last
    x, grad = (torch.empty(T, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (x, grad):
        tensor[:-last] = float("nan")  # whoever reads another row than the last ones shows it
        tensor[-last:] = torch.randn(last, D, generator=generator, device=device)
    rows = torch.arange(T - last, T, device=device)[::2].contiguous()
    near, near_grad, near_rows = x[-last:].clone(), grad[-last:].clone(), rows - (T - last)
    weight, y, grad_y = (
        torch.randn(*n, D, generator=generator, device=device) for n in ((), (last // 2,), (last // 2,))
    )
    found = []
    for stream, gradient, where in ((x, grad, rows), (near, near_grad, near_rows)):
        normed, kept = movement.gather_norm(
            stream, where, weight, None, 1e-5, centered=False, dtype=torch.bfloat16, keep_rows=True
        )
        assert kept is not None
        movement.add_rows_(stream, where, y)
        movement.add_norm_gradient_(gradient, where, grad_y, kept, weight, 1e-5, centered=False)
        found.append((normed, kept))
    assert all(torch.equal(far, close) for far, close in zip(*found, strict=True))
    assert torch.equal(x[-last:], near)
    assert torch.equal(grad[-last:], near_grad)
    assert torch.equal(movement.gather_rows(x, rows), movement.gather_rows(near, near_rows))
    for tensor in (x, grad):
        assert tensor[: T - last].isnan().all()


@pytest.mark.gpu
def test_a_step_of_more_than_2_31_hidden_numbers(device: torch.device) -> None:
    """Everything kept equals dense, and a quarter kept gives finite gradients."""
    needs(70)
    T = 2**31 // 4096 + 4096
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=T,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    model.requires_grad_(False)
    trained = [model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].mlp.up_proj.weight]
    for weight in trained:
        weight.requires_grad_(True)
    ids = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, :-512] = -100

    def gradients(settings: lemo.SparsityConfig) -> torch.Tensor:
        model.zero_grad()
        lemo.sparsify(model, settings)
        if settings.mode == "dense":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=labels).loss.backward()
        lemo.restore(model)
        model.gradient_checkpointing_disable()
        torch.cuda.empty_cache()
        return torch.cat([weight.grad.float().flatten() for weight in trained])

    dense = gradients(lemo.SparsityConfig(mode="dense"))
    kept = gradients(lemo.SparsityConfig(fidelity=1.0))
    assert float((kept - dense).norm() / dense.norm()) <= 2e-2
    quarter = gradients(lemo.SparsityConfig(fidelity=1.0, keep=0.25, block_size=64))
    assert quarter.isfinite().all()
    assert quarter.any()
