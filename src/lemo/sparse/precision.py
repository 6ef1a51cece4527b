"""The dtype that products are computed in: autocast's where it is on."""

from __future__ import annotations

import torch


def computes_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """What autocast on that kind of device makes of operands of that dtype; without autocast, the dtype itself."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
