"""A tiny model in a directory, for the loading tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import build


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
