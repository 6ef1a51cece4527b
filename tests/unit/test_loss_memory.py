"""What the segmented loss never makes, never saves, and how much it takes at its peak."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_loss import HEADS, D, Net, V, batch, lora_net, reference_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lemo.loss import segmented_cross_entropy, token_losses
from lemo.loss.segmented import CHUNK_MIB, _chunk_rows


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation's output has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_no_tensor_has_all_rows_times_the_vocabulary(head: str, with_gradients: bool) -> None:
    rows, chunk_rows = 400, 8
    net = HEADS[head]()
    tokens_N, labels_N = batch(rows, masked="none")
    with LargestTensor() as full:
        reference_loss(net, tokens_N, labels_N, None).backward()
    assert full.numel == rows * V  # the recorder sees what it must not see below
    with LargestTensor() as ours:
        if with_gradients:
            segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=chunk_rows).backward()
        else:
            token_losses(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=chunk_rows)
    assert ours.numel <= max(rows * D, V * D, chunk_rows * V)


def test_only_labelled_rows_reach_the_head() -> None:
    net = Net()
    tokens_N, labels_N = batch()
    seen: list[int] = []
    net.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    segmented_cross_entropy(net.hidden(tokens_N), net.lm_head, labels_N, chunk_rows=4)
    assert seen == [4, 4, 1]
    assert sum(seen) == int((labels_N != -100).sum())


def test_nothing_with_vocabulary_columns_is_saved_for_backward() -> None:
    net = lora_net()
    tokens_N, labels_N = batch(300, masked="none")
    saved: list[torch.Size] = []
    hidden_ND = net.hidden(tokens_N)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        segmented_cross_entropy(hidden_ND, net.lm_head, labels_N, chunk_rows=300)
    kept = sum(shape.numel() for shape in saved if V in shape and 300 in shape)
    assert kept == 0


def test_chunk_rows_follow_the_byte_budget() -> None:
    hidden_ND = torch.zeros(1, 4, dtype=torch.bfloat16)
    llama = nn.Linear(4, 128_256, device="meta")
    assert _chunk_rows(llama, hidden_ND, None) == 256
    assert CHUNK_MIB * 2**20 >= 256 * 128_256 * 14
    assert _chunk_rows(nn.Linear(4, 10**9, device="meta"), hidden_ND, None) == 1
    assert _chunk_rows(nn.Sequential(nn.Linear(4, 2048).bfloat16()), hidden_ND, None) == 18_688
    assert _chunk_rows(llama, hidden_ND, 5) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_peak_memory_stays_within_the_budget(lora: bool, device: torch.device) -> None:
    """Llama-3's vocabulary in bfloat16: `CHUNK_MIB`, the gradients that are handed out, and 8 MiB of small things."""
    rows, width, vocabulary = 4096, 1024, 128_256
    head: nn.Module = nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    head.requires_grad_(False)
    if lora:
        wrapper = get_peft_model(nn.ModuleDict({"lm_head": head}), LoraConfig(r=8, target_modules=["lm_head"]))
        head = wrapper.base_model.model["lm_head"]
    hidden_ND = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels_N = torch.randint(vocabulary, (rows,), device=device)
    # cuBLAS takes its workspace at the first call.
    segmented_cross_entropy(hidden_ND[:8], head, labels_N[:8]).backward()
    hidden_ND.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = segmented_cross_entropy(hidden_ND, head, labels_N)
    peak = torch.cuda.max_memory_allocated() - before
    loss.backward()
    assert hidden_ND.grad is not None
    # A trainable parameter's gradient exists twice in a chunk (its own and the fp32 sum), and once more as it is made.
    handed_out = hidden_ND.nbytes + 3 * sum(p.nbytes for p in head.parameters() if p.requires_grad)
    assert peak <= CHUNK_MIB * 2**20 + handed_out + 2**23
    assert peak >= 64 * 2**20  # the measurement sees the chunks
