"""`sparsify` forks nothing and `restore` undoes it exactly (DESIGN 4.7)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import config, pair, step
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lemo
from reference import assert_same_gradients, gradients
from tiny import FAMILIES, build, make_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "backward": {"fidelity": 0.6},
    "segments": {"policy": "segments", "segments": {"spans": 3, "drawn": 1}},
    "forward": {"mode": "forward", "keep": 0.5},
    "dense": {"mode": "dense"},
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def anatomy(model: nn.Module) -> dict[str, tuple[type, dict[str, Any], dict[str, int]]]:
    """Every module's class, attributes, and number of hooks."""
    return {
        name: (type(module), dict(vars(module)), {kind: len(getattr(module, kind)) for kind in HOOKS})
        for name, module in model.named_modules()
    }


def assert_same_anatomy(got: nn.Module, want: dict[str, tuple[type, dict[str, Any], dict[str, int]]]) -> None:
    found = anatomy(got)
    assert found.keys() == want.keys()
    for name, (kind, attributes, hooks) in want.items():
        assert found[name][0] is kind, name
        assert found[name][1].keys() == attributes.keys(), name
        assert found[name][2] == hooks, name
        for key, value in attributes.items():
            mine = found[name][1][key]
            if callable(value) or isinstance(value, (int, float, str, bool, type(None))):
                assert mine is value or mine == value, (name, key)


RESTORED = [(f, m, lora) for f in FAMILIES for m in SETTINGS for lora in (True, False) if lora or f in ("llama", "opt")]


@pytest.mark.parametrize(("family", "mode", "lora"), RESTORED)
def test_restore_is_exact(family: str, mode: str, lora: bool, device: torch.device) -> None:
    model = build(family, device, lora=lora)
    batch = make_batch("right", device)
    before, keys = anatomy(model), list(model.state_dict())
    want_loss, want = step(model, batch)
    assert lemo.sparsify(model, config(**SETTINGS[mode])) is model
    assert lemo.models.get_runtime(model) is not None
    assert list(model.state_dict()) == keys
    step(model, batch)
    assert list(model.state_dict()) == keys
    model.eval()
    with torch.no_grad():
        model(**batch.inputs())
    model.train()
    assert lemo.restore(model) is model
    assert_same_anatomy(model, before)
    assert list(model.state_dict()) == keys
    assert lemo.models.get_runtime(model) is None
    loss, got = step(model, batch)
    assert torch.equal(loss, want_loss)
    assert got.keys() == want.keys()
    assert_same_gradients(got, want, rel=1e-6)
    assert model(**batch.inputs()).logits is not None


def test_class_names_stay(device: torch.device) -> None:
    """FSDP's wrapping policy and transformers' `_no_split_modules` look layers up by their class's name."""
    model = build("llama", device)
    names = [type(module).__name__ for module in model.modules()]
    lemo.sparsify(model, config())
    assert [type(module).__name__ for module in model.modules()] == names


@pytest.mark.parametrize("mode", SETTINGS)
def test_layers_can_be_copied(mode: str, device: torch.device) -> None:
    """`copy.deepcopy` of a sparsified model is a sparsified model of its own."""
    _, sparse = pair("llama", device, config(**(SETTINGS[mode] if mode != "segments" else {"fidelity": 0.9})))
    twin = copy.deepcopy(sparse)
    batch = make_batch("right", device)
    _, want = step(sparse, batch)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert_same_gradients(step(twin, batch)[1], want)


def test_sparsify_twice_is_an_error(device: torch.device) -> None:
    model = lemo.sparsify(build("llama", device), config())
    with pytest.raises(ValueError, match="restore"):
        lemo.sparsify(model, config(fidelity=0.5))
    assert lemo.models.get_runtime(lemo.restore(model)) is None
    lemo.sparsify(model, config(fidelity=0.5))


def test_unknown_architecture_names_the_supported_ones(device: torch.device) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).to(device)
    before = anatomy(model)
    with pytest.raises(ValueError) as error:
        lemo.sparsify(model, config())
    for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "opt"):
        assert name in str(error.value).lower()
    assert_same_anatomy(model, before)


@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_adapter_saved_while_sparsified_is_stock(family: str, device: torch.device, tmp_path: Path) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.6))
    sparse.save_pretrained(tmp_path)
    base = build(family, device, lora=False)
    loaded = PeftModel.from_pretrained(base, tmp_path).to(device).eval()
    batch = make_batch("left", device)
    dense.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch.inputs()).logits, dense(**batch.inputs()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_saved_while_sparsified_is_stock(family: str, device: torch.device, tmp_path: Path) -> None:
    dense, sparse = pair(family, device, config(fidelity=0.6), lora=False)
    step(sparse, make_batch("left", device))
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert type(loaded) is type(dense)
    batch = make_batch("left", device)
    dense.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch.inputs()).logits, dense(**batch.inputs()).logits)


def test_state_dict_of_the_unmodified_model_loads(device: torch.device) -> None:
    dense, sparse = pair("qwen2", device, config(fidelity=1.0))
    other = build("qwen2", device, seed=9)
    sparse.load_state_dict(other.state_dict(), strict=True)
    batch = make_batch("right", device)
    assert_same_gradients(step(sparse, batch)[1], step(other, batch)[1])
    assert gradients(dense) == {}


def test_merged_adapter_after_restore(device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(fidelity=0.6))
    batch = make_batch("right", device)
    step(sparse, batch)
    merged = lemo.restore(sparse).merge_and_unload().eval()
    dense.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**batch.inputs()).logits[batch.real_mask()],
            dense(**batch.inputs()).logits[batch.real_mask()],
            rtol=1e-4,
            atol=1e-4,
        )


def test_generation_is_the_unmodified_model(device: torch.device) -> None:
    dense, sparse = pair("qwen3", device, config(mode="forward", keep=0.3))
    prompt = make_batch("plain", device).input_ids
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.eval().generate(prompt, **ask), dense.eval().generate(prompt, **ask))
