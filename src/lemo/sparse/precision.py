"""The dtype that products are computed in: autocast's where it is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def computes_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """What autocast on that kind of device makes of operands of that dtype; without autocast, the dtype itself."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def products_in(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside, autocast leaves matrix products of that dtype alone; entering its own context takes microseconds."""
    return nullcontext() if computes_in(device, dtype) == dtype else torch.autocast(device, enabled=False)
