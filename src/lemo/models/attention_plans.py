"""Whether torch's attention may use cuDNN, which makes a plan for each new shape before it computes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A plan takes 0.1 s forward and 0.1 s backward; FlashAttention-2 needs none, and at this many operations in a layer's
# forward (16,384 tokens of Llama-3-8B, of SmolLM2-135M 44,000) takes 3 ms longer: 0.1 s in 32 layers.
_WORTH_A_PLAN = 2**41
_log = logging.getLogger("lemo")


@contextmanager
def attention_for(config: Any, tokens: int) -> Iterator[None]:
    """Inside, torch's attention leaves cuDNN out where sequences are too short to be worth a plan for each length.

    Fine-tuning meets a new length with nearly every sequence: on an H100 a step of SmolLM2-135M at lengths of 2K to 16K
    takes 650 ms with plans and 400 ms without (docs/LOG.md).

    Args:
        config: the model's.
        tokens: longest sequence.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    short = 2 * tokens**2 * width < _WORTH_A_PLAN
    if enabled and short and torch.cuda.is_available():
        _note(tokens)
    torch.backends.cuda.enable_cudnn_sdp(enabled and not short)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@functools.cache
def _note(tokens: int) -> None:
    """Said once: a calibration evaluates hundreds of times."""
    _log.info("attention: without cuDNN, whose plans for each length cost more than they save at %d tokens", tokens)
