"""Models that others have wrapped, dispatched, compiled or asked for something else: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from pairs import config
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lemo.models
from lemo.models.architectures import architecture_of
from lemo.models.view import ArchitectureView
from reference import assert_same_gradients, gradients
from tiny import add_lora, build, causal_lm, layers_of, make_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "backward": {"fidelity": 0.6},
    "segments": {"policy": "segments", "segments": {"spans": 3, "drawn": 3}},
    "forward": {"mode": "forward", "keep": 0.5},
    "dense": {"mode": "dense"},
    "attend": {"mode": "dense", "attend": {"density": 0.5, "block": 4}},
}


def run(model: Any, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**(make_batch("right").inputs() | changes))
    assert output.logits is None
    output.loss.backward()
    return output.loss.detach(), gradients(model)


@pytest.mark.parametrize("mode", SETTINGS)
def test_models_over_several_devices_are_sparsified(mode: str) -> None:
    """accelerate's hooks keep a module's forward, which must be the sparse one; and go on after `restore`."""
    plain = build("llama", lora=False)
    places = dict.fromkeys(("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"), "cpu")
    device_map: Any = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    dispatched = dispatch_model(copy.deepcopy(plain), device_map, force_hooks=True)
    (_, want), (_, got) = (
        run(lemo.sparsify(add_lora(m), config(**SETTINGS[mode])).train()) for m in (plain, dispatched)
    )
    assert_same_gradients(got, want)
    lemo.restore(dispatched)
    assert dispatched(**make_batch("right").inputs()).logits is not None


def test_a_forward_that_somebody_replaced_is_refused() -> None:
    model = build("llama", lora=False)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with pytest.raises(ValueError, match="forward has been replaced on this instance"):
        lemo.sparsify(prepared, config())
    assert lemo.models.get_runtime(model) is None


def test_a_restored_model_that_was_prepared_runs() -> None:
    model = lemo.sparsify(build("llama", lora=False), config())
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    prepared(**make_batch("right").inputs()).loss.backward()
    lemo.restore(prepared)
    assert prepared(**make_batch("right").inputs()).logits is not None
    assert prepared.eval().generate(make_batch("plain").input_ids, max_new_tokens=2, pad_token_id=0).shape[1] > 2


@pytest.mark.parametrize("mode", SETTINGS)
def test_generation_between_steps_is_the_unmodified_model(mode: str) -> None:
    ids = make_batch("plain").input_ids
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = build("llama").train().generate(ids, **asked)
    model = lemo.sparsify(build("llama"), config(**SETTINGS[mode])).train()
    assert torch.equal(model.generate(ids, **asked), want)
    run(model)


@pytest.mark.parametrize("mode", SETTINGS)
def test_compiled_models_train_as_they_are(mode: str) -> None:
    model = lemo.sparsify(build("llama"), config(**SETTINGS[mode]))
    loss, want = run(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    found = compiled(**make_batch("right").inputs()).loss
    found.backward()
    assert torch.equal(found.detach(), loss)
    assert_same_gradients(gradients(model), want, rel=0.0)


@pytest.mark.parametrize("mode", ["dense", "backward"])
def test_packed_documents_stay_apart_where_a_cache_is_configured(mode: str) -> None:
    inputs = {key: x for key, x in make_batch("packed").inputs().items() if key != "use_cache"}
    losses = []
    for cache in (True, False):
        model = lemo.sparsify(build("llama"), config(mode=mode))
        causal_lm(model).config.use_cache = cache
        losses.append(model(**inputs).loss.detach())
    assert torch.equal(*losses)


def test_a_wrapped_attention_runs_in_mode_backward() -> None:
    (_, want), (_, got) = (
        run(lemo.sparsify(m, config(fidelity=0.6))) for m in (build("llama"), wrapped(build("llama")))
    )
    assert_same_gradients({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in got.items()}, want)


def wrapped(model: Any) -> Any:
    for layer in layers_of(model):
        layer.self_attn = checkpoint_wrapper(layer.self_attn)
    return model


def test_another_loss_and_data_parallel_are_refused() -> None:
    model = lemo.sparsify(build("llama"), config())
    causal_lm(model).loss_function = lambda **_: torch.zeros(())
    with pytest.raises(ValueError, match="a loss function of its own"):
        model(**make_batch("right").inputs())
    with pytest.raises(RuntimeError, match=r"doesn't run under nn\.DataParallel"):
        causal_lm(model)._replicate_for_data_parallel()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("mode", SETTINGS)
def test_offloaded_models_train(mode: str, lora: bool) -> None:
    """accelerate's hooks bring parameters when their layer runs; before, they are on no device."""
    ids = torch.randint(3, 100, (2, 40))
    losses = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = build("llama", lora=lora, dtype=torch.bfloat16)
        lemo.sparsify(model, config(**SETTINGS[mode]))
        if offloaded:
            cpu_offload(causal_lm(model), execution_device="cpu")
        losses.append(model(input_ids=ids, labels=ids).loss.detach())
    # Linears with hooks aren't fused with their LoRA, which rounds otherwise.
    torch.testing.assert_close(*losses, rtol=1e-3 if lora else 0, atol=0)


def test_prompt_tuning_needs_padding_on_the_right() -> None:
    models = [
        get_peft_model(build("llama", lora=False), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    lemo.sparsify(models[1], config(fidelity=1.0))
    for model in models:
        model.train()(**make_batch("right").inputs()).loss.backward()
    (want, got) = (gradients(model) for model in models)
    assert list(got) == ["prompt_encoder.default.embedding.weight"]
    assert_same_gradients(got, want)
    with pytest.raises(ValueError, match="with PEFT's prompt tuning on the right"):
        models[1](**make_batch("left").inputs())


def test_prefix_tuning_is_refused() -> None:
    model = get_peft_model(build("llama", lora=False), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="prefix tuning fills one: use LoRA or prompt tuning"):
        lemo.sparsify(model, config()).train()(**make_batch("plain").inputs())


def test_a_wrapped_attention_keeps_its_window() -> None:
    model = build("qwen2-window", lora=False)
    layers, row = layers_of(model), architecture_of("qwen2")
    windows = [ArchitectureView(layer, row).window for layer in layers]
    assert len(set(windows)) > 1
    wrapped(model)
    assert [ArchitectureView(layer, row).window for layer in layers] == windows
