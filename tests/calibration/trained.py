"""Small models trained on real text for a few hundred steps, so that their layers do what a predictor can learn."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tiny import build
from tiny_tokenizer import byte_tokenizer

FAMILIES = ["llama", "opt"]
TOKENS = 512
STEPS = 220


def save_text(directory: Path, *, count: int = 60) -> Path:
    """Files of 512 bytes of Python's own library: one token a byte."""
    directory.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(path for path in library.glob("*.py") if path.stat().st_size > 4 * TOKENS)
    for index, path in enumerate(sources[:count]):
        text = path.read_bytes().decode("ascii", "replace").replace("\ufffd", "?")
        (directory / f"{path.stem}.txt").write_text(text[TOKENS : 2 * TOKENS], encoding="ascii")
        assert index < count
    return directory


def train(family: str, directory: Path, texts: Path) -> float:
    """Trains a model of four layers, saves it with its tokenizer; returns the last steps' mean loss (nats a byte)."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": TOKENS}
    sizes |= {"ffn_dim": 160, "word_embed_proj_dim": 64} if family == "opt" else {"intermediate_size": 160}
    model: Any = build(family, lora=False, vocab_size=len(tokenizer), **sizes)
    # transformers' own initial weights, which train; the parity tests' are loud.
    model.apply(model._init_weights)
    rows = [tokenizer(path.read_text())["input_ids"][:TOKENS] for path in sorted(texts.iterdir())]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for step in range(STEPS):
        ids = torch.tensor([rows[(2 * step + i) % len(rows)] for i in range(2)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(losses[-20:]) / 20


def load(place: Any, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(place.model(family), dtype=dtype)
