"""Names for the parts of a step, seen by torch's profiler; nothing happens while it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

PREFIX = "lemo: "


def part(name: str) -> AbstractContextManager[Any]:
    """Inside, the profiler counts work as the part `name`; the innermost name counts."""
    # A range costs a few microseconds, which a small model's step would feel.
    return torch.profiler.record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext()
