"""RMS norms by torch's kernel: no further from fp32 than transformers' own, and only where they are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lemo.models import norms
from lemo.models.fused import fused as fused_modules

KNOWN = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[torch.dtype]:
    """Norms are fused on the tests' device too; notes the dtypes that were."""
    seen: list[torch.dtype] = []

    def noted(hidden: Tensor, *args: Any) -> Tensor:
        seen.append(hidden.dtype)
        return F.rms_norm(hidden, *args)

    monkeypatch.setattr(norms, "_DEVICES", (device.type,))
    monkeypatch.setattr(norms, "F", type("F", (), {"rms_norm": staticmethod(noted)}))
    return seen


def run(norm: nn.Module, x: Tensor, fusing: bool) -> list[Tensor]:
    """Output, gradient of x, gradient of the weight."""
    norm.zero_grad()
    leaf = x.clone().requires_grad_()
    with fused_modules((), [norm] if fusing else []):
        out = norm(leaf)
    out.backward(torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out).to(out.dtype))
    return [out.detach(), leaf.grad, norm.weight.grad.clone()]  # type: ignore[list-item, union-attr, operator]


@pytest.mark.parametrize("kind", KNOWN)
def test_no_further_from_fp32_than_transformers_own(kind: Any, fused: list[torch.dtype], device: torch.device) -> None:
    norm = kind(64, eps=1e-3).to(device)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = 0.1 * torch.randn(3, 700, 64, device=device)
    low, x_low = kind(64, eps=1e-3).to(device, torch.bfloat16), x.to(torch.bfloat16)
    low.load_state_dict(norm.state_dict())
    norm.load_state_dict(low.state_dict())
    exact = run(norm, x_low.float(), False)
    own = run(low, x_low, False)
    found = run(low, x_low, True)
    assert fused == [torch.bfloat16]
    for right, ours, theirs in zip(exact, found, own, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert 0 < (ours.float() - right).norm() <= 1.05 * (theirs.float() - right).norm()


def test_fp32_and_mixed_dtypes_run_the_module(fused: list[torch.dtype], device: torch.device) -> None:
    norm, x = LlamaRMSNorm(8).to(device), torch.randn(5, 8, device=device)
    for left, right in zip(run(norm, x, True), run(norm, x, False), strict=True):
        assert torch.equal(left, right)
    with fused_modules((), [norm]):
        assert norm(x.to(torch.bfloat16)).dtype == torch.float32
    assert not fused


def test_other_norms_are_left_alone(fused: list[torch.dtype], device: torch.device) -> None:
    x = torch.randn(5, 8, device=device, dtype=torch.bfloat16)
    for norm in (GemmaRMSNorm(8), nn.LayerNorm(8), nn.RMSNorm(8), type("LlamaRMSNorm", (nn.RMSNorm,), {})(8)):
        norm = norm.to(device, torch.bfloat16)
        with fused_modules((), [norm]):
            assert "forward" not in norm.__dict__
            norm(x)
    assert not fused


def test_more_numbers_than_torchs_kernel_can_count_run_the_module(
    fused: list[torch.dtype], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, x = LlamaRMSNorm(8).to(device, torch.bfloat16), torch.randn(5, 8, device=device).to(torch.bfloat16)
    monkeypatch.setattr(norms, "_MOST", 40)
    with fused_modules((), [norm]):
        norm(x)
        assert not fused
        norm(x[:4])
        assert fused == [torch.bfloat16]


def test_on_a_cpu_the_module_itself_runs() -> None:
    norm, x = LlamaRMSNorm(8).to(torch.bfloat16), torch.randn(5, 8).to(torch.bfloat16)
    with fused_modules((), [norm]):
        inside = norm(x)
    assert torch.equal(inside, norm(x))
    assert "forward" not in norm.__dict__
