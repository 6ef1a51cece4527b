"""Models by name: what is wrong with a name or a directory is said, with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lemo.config import ModelConfig, RopeScaling, RunConfig
from lemo.errors import UserError
from lemo.models.loading import load_model, load_tokenizer
from lemo.training.checks import check_length
from tiny import build, make_batch


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_local_directory(tiny_dir: Path) -> None:
    model, tokenizer = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    saved = load_file(tiny_dir / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert tokenizer("a b")["input_ids"] == [3, 4]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_dtype_and_attention_are_as_asked(tiny_dir: Path) -> None:
    model, _ = load_model(ModelConfig(name=str(tiny_dir), dtype="bfloat16", attention="eager"), "cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_rope_scaling_is_transformers_own(tiny_dir: Path, rope_type: str) -> None:
    change_config(tiny_dir, rope_parameters=None, rope_theta=5000.0)  # as models of transformers 4 have it
    scaling = RopeScaling(rope_type=rope_type, factor=4.0)
    model, _ = load_model(ModelConfig(name=str(tiny_dir), rope_scaling=scaling), "cpu")
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 5000.0}
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = 128
    assert model.config.rope_parameters == rope
    want = build("llama", lora=False, rope_parameters=rope, max_position_embeddings=512).eval()
    plain, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    batch = make_batch("plain").inputs(labels=False)
    assert torch.equal(model(**batch).logits, want(**batch).logits)
    assert not torch.allclose(model(**batch).logits, plain(**batch).logits)


def test_rope_scaling_makes_room_for_longer_data(tiny_dir: Path) -> None:
    data = {"max_tokens": 300}
    plain = RunConfig.model_validate({"model": {"name": str(tiny_dir)}, "data": data})
    with pytest.raises(UserError, match=r"has 128 positions; .*model\.rope_scaling"):
        check_length(load_model(plain.model, "cpu")[0], plain)
    model = {"name": str(tiny_dir), "rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    scaled = RunConfig.model_validate({"model": model, "data": data})
    loaded, _ = load_model(scaled.model, "cpu")
    assert loaded.config.max_position_embeddings == 320
    check_length(loaded, scaled)


def test_positions_that_cannot_be_scaled(tiny_dir: Path) -> None:
    scaling = RopeScaling(rope_type="yarn", factor=4.0)
    change_config(tiny_dir, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match=r"scales its RoPE already \(linear\); leave model\.rope_scaling out"):
        load_model(ModelConfig(name=str(tiny_dir), rope_scaling=scaling), "cpu")
    build("opt", lora=False).save_pretrained(tiny_dir)
    with pytest.raises(UserError, match=r"has no RoPE.*leave model\.rope_scaling out"):
        load_model(ModelConfig(name=str(tiny_dir), rope_scaling=scaling), "cpu")


def _missing_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def _no_type(directory: Path) -> None:
    change_config(directory, model_type=None)


def _foreign_type(directory: Path) -> None:
    change_config(directory, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def _unknown_type(directory: Path) -> None:
    change_config(directory, model_type="nonsense")


def _missing_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _cut_weights(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def _absent_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _other_shape(directory: Path) -> None:
    change_config(directory, intermediate_size=60)


def _no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def _broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0"')


def _adapter_instead(directory: Path) -> None:
    (directory / "config.json").rename(directory / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_config, r"no config\.json.*set model\.name"),
        (_broken_config, "can't read the configuration.*copy or download the model again"),
        (_no_type, "names no model_type.*copy or download"),
        (_foreign_type, "doesn't support the architecture 'gpt2'; supported: llama, mistral, opt, qwen2, qwen3"),
        (_unknown_type, "doesn't support the architecture 'nonsense'; supported: llama"),
        (_missing_weights, "can't load the weights.*copy or download"),
        (_cut_weights, "can't load the weights.*copy or download"),
        (_absent_tensor, r"lack 1 tensors .*layers\.1\.mlp\.up_proj.*copy or download"),
        (_other_shape, "can't load the weights.*copy or download"),
        (_no_tokenizer, "can't load the tokenizer.*copy or download"),
        (_broken_tokenizer, "can't load the tokenizer.*copy or download"),
        (_adapter_instead, "is an adapter, not a model"),
    ],
)
def test_a_damaged_directory(tiny_dir: Path, damage: Any, message: str) -> None:
    damage(tiny_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    assert "\n" not in str(caught.value)


def test_an_unsupported_architecture_is_found_before_anything_is_read(tiny_dir: Path) -> None:
    _foreign_type(tiny_dir)
    _missing_weights(tiny_dir)
    _no_tokenizer(tiny_dir)
    with pytest.raises(UserError, match="doesn't support the architecture"):
        load_model(ModelConfig(name=str(tiny_dir)), "cpu")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_directory(name: str) -> None:
    with pytest.raises(UserError, match="there is no model directory"):
        load_model(ModelConfig(name=name), "cpu")


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"can't read the configuration of some/model: .*model\.name.*smollm2"):
        load_model(ModelConfig(name="some/model"), "cpu")
    with pytest.raises(UserError, match=r"can't load the tokenizer of some/model: .*huggingface\.co"):
        load_tokenizer("some/model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(tiny_dir: Path) -> None:
    with pytest.raises(UserError, match="--device cpu"):
        load_model(ModelConfig(name=str(tiny_dir)), "cuda")
