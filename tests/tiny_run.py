"""A tiny model on disk, text to train on, and short runs of it, for the tests of training and of the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from lemo.config import RunConfig
from lemo.config_io import load_config
from tiny import build
from tiny_tokenizer import byte_tokenizer

WORDS = ("block", "token", "layer", "prompt", "keep", "drop", "gradient", "sparse", "long", "text")


def save_model(directory: Path, *, layers: int = 2, seed: int = 0, **overrides: Any) -> Path:
    """A random two-layer Llama over bytes, with its tokenizer, as `from_pretrained` reads them."""
    tokenizer = byte_tokenizer()
    model: Any = build(
        "llama",
        lora=False,
        seed=seed,
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=16,
        intermediate_size=24,
        max_position_embeddings=256,
        **overrides,
    )
    # The random models of the parity tests are loud; a calm one has a loss that training lowers.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_texts(directory: Path, *, count: int = 12, seed: int = 0) -> Path:
    """Text files of about 100 to 160 bytes, no two alike."""
    generator = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        length = generator.randint(100, 160)
        text = f"{index} "
        while len(text) < length:
            text += generator.choice(WORDS) + " "
        (directory / f"{index:02}.txt").write_text(text[:length])
    return directory


def run_settings(model: Path, data: Path, output: Path, *overrides: str) -> RunConfig:
    """Six steps on the CPU; `overrides` as for --set."""
    return load_config(None, data=str(data), model=str(model), output=str(output), overrides=[*QUICK, *overrides])


QUICK = (
    "device=cpu",
    "data.max_tokens=192",
    "data.completion_tokens=24",
    "data.heldout_share=0.3",
    "lora.r=4",
    "sparsity.block_size=16",
    "training.steps=6",
    "training.save_every=2",
    "training.warmup_steps=1",
    "training.learning_rate=5e-3",
    "evaluation.documents=2",
    "evaluation.buckets=3",
    "evaluation.sample_tokens=4",
)
