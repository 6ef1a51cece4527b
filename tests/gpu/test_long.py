"""Longer inputs in bf16 on a GPU: gradients within bf16's own error, and memory that follows what is kept."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lemo
from lemo.kernels import dispatch
from lemo.models import get_runtime
from lemo.selection.placement import place_blocks
from lemo.sparse import attention

pytestmark = pytest.mark.gpu

T, LABELS = 8192, 512


def build(dtype: torch.dtype, device: torch.device, tokens: int = T, kv_heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).train()


def batch(device: torch.device, tokens: int = T) -> dict[str, torch.Tensor]:
    ids = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, all gradients as one fp32 vector)."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach().float(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def test_bf16_gradients_are_as_close_to_fp32_as_the_dense_models(device: torch.device) -> None:
    inputs = batch(device)
    _, exact = gradients(build(torch.float32, device), inputs)
    dense_loss, dense = gradients(build(torch.bfloat16, device), inputs)
    sparse = lemo.sparsify(build(torch.bfloat16, device), lemo.SparsityConfig(fidelity=1.0, tile_mib=8))
    loss, found = gradients(sparse, inputs)
    own = ((dense - exact).norm() / exact.norm()).item()
    error = ((found - exact).norm() / exact.norm()).item()
    assert error <= 1.1 * own + 1e-3, (error, own)
    assert loss.item() == pytest.approx(dense_loss.item(), rel=1e-3)


def test_attention_by_rectangles_is_as_close_to_fp32_as_our_kernels(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same blocks kept in all three, so that only the arithmetic differs."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("rectangles are cut on Hopper only")
    tokens = 4 * T
    inputs = batch(device, tokens)

    def run(dtype: torch.dtype, by_library: bool) -> torch.Tensor:
        used: list[int] = []

        def noted(q: torch.Tensor) -> bool:
            used.append(q.shape[1])
            return by_library and dispatch.prefix_by_library(q)

        monkeypatch.setattr(attention, "prefix_by_library", noted)
        config = lemo.SparsityConfig(block_size=64, kv_grad="all")
        # torch's fp32 attention of grouped heads forms all pairs of tokens, 32 GiB.
        model = lemo.sparsify(build(dtype, device, tokens, kv_heads=8), config)
        runtime = get_runtime(model)
        assert runtime is not None
        runtime.placement = lambda layout, labelled, layer: place_blocks(layout, labelled, 0.5, [1.0])
        _, found = gradients(model, inputs)
        assert used == [tokens // 2] * 4
        return found

    exact, own, found = run(torch.float32, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    assert not torch.equal(own, found), "no rectangle was cut"
    errors = [float((x - exact).norm() / exact.norm()) for x in (found, own)]
    assert errors[0] <= 1.1 * errors[1] + 1e-3, errors


@pytest.mark.parametrize("kv_grad", ["all", "kept"])
def test_capped_plans_run_and_bound_memory(kv_grad: str, device: torch.device) -> None:
    """Keeping an eighth needs less than checkpointing's full recomputation, whose own peak is the dense mode's."""
    inputs = batch(device)
    peaks = {}
    for name, settings in {
        "dense": lemo.SparsityConfig(mode="dense"),
        "eighth": lemo.SparsityConfig(keep=0.125, kv_grad=kv_grad),
    }.items():
        model = lemo.sparsify(build(torch.bfloat16, device), settings)
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.requires_grad_(True)
        model.model.layers[0].mlp.down_proj.requires_grad_(True)
        if name == "dense":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        model(**inputs).loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() - held
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    runtime = get_runtime(model)
    assert runtime is not None
    assert runtime.collect().keep_mean <= 0.125 + 1e-9
    assert peaks["eighth"] < peaks["dense"], peaks


def test_packed_documents_need_no_mask_of_their_square(device: torch.device) -> None:
    """The loss of packed documents is that of the documents one by one, and memory stays under a T×T mask's."""
    tokens = 4 * T
    ends = [0, 5000, 5001, 20000, tokens]
    inputs = batch(device, tokens)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None].to(device)
    inputs["labels"][0, ends[:-1]] = -100
    model = lemo.sparsify(build(torch.bfloat16, device, tokens), lemo.SparsityConfig(keep=0.25, labelled="ranked"))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found, _ = gradients(model, inputs)
    # A mask takes three bytes a pair: sdpa makes one of bf16 of the bools.
    assert torch.cuda.max_memory_allocated() - held < 1.5 * tokens**2
    sums = []
    with torch.no_grad():
        for a, b in pairwise(ends):
            one = {"input_ids": inputs["input_ids"][:, a:b], "labels": inputs["labels"][:, a:b]}
            sums.append(model(**one).loss.double() * (b - a - 1) if b - a > 1 else torch.zeros((), device=device))
    assert found.item() == pytest.approx(float(sum(sums)) / (tokens - len(ends) + 1), rel=1e-3)


def test_a_copy_of_a_sparsified_model_is_its_own(device: torch.device) -> None:
    model = lemo.sparsify(build(torch.bfloat16, device), lemo.SparsityConfig(keep=0.25))
    twin = copy.deepcopy(model)
    inputs = batch(device)
    _, first = gradients(model, inputs)
    _, second = gradients(twin, inputs)
    assert get_runtime(twin) is not get_runtime(model)
    torch.testing.assert_close(first, second, rtol=5e-2, atol=1e-3)
