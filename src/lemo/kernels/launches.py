"""How the block-sparse kernels run: tiles, warps and stages, by head size, key block and GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """How one kernel runs.

    Attributes:
        lanes: (query, head) pairs of a tile, a power of two.
        keys: most keys of a tile, a power of two; a key block of fewer is a tile.
        warps: of a program.
        stages: tiles in flight, 1 for none beside the one at work.
        tma: whether the hardware copies whole tiles (Hopper's TMA), which takes addresses out of threads' registers.
    """

    lanes: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Launches:
    """Of the forward, the gradient of queries, and that of keys and values."""

    forward: Launch
    queries: Launch
    keys: Launch


# Rows of a head of at most so many bytes leave room for tiles in flight.
_SMALL_BYTES = 256
# Wider ones need up to 144 KiB of a multiprocessor's memory, more than many cards have; there a tile of 32.
_LARGE = Launches(Launch(128, 64, 8, 1), Launch(64, 64, 4, 1), Launch(64, 64, 4, 1))
_LARGE_BYTES = 144 * 2**10
_TIGHT = Launches(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))
_SMALL = Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2))
# By key block, up to 64 and 128: `benchmarks.sweep_attend` on an H100.
_HOPPER = {
    64: Launches(*[Launch(64, 64, 4, 2, tma=True)] * 3),
    128: Launches(Launch(128, 128, 8, 3), Launch(128, 128, 8, 2), Launch(64, 128, 8, 2)),
}


def launches_for(row_bytes: int, key_block: int, device: torch.device) -> Launches:
    """What was found best, or fits by its size.

    Args:
        row_bytes: of a row of one head.
        key_block: tokens of a key block.
        device: of the tensors.
    """
    generation, memory = card(device)
    if row_bytes > _SMALL_BYTES:
        return _LARGE if memory >= _LARGE_BYTES else _TIGHT
    return _HOPPER[128 if key_block > 64 else 64] if generation == 9 else _SMALL


@functools.cache
def card(device: torch.device) -> tuple[int, int]:
    """Compute capability's first number, and bytes of shared memory that a program may have; a CPU has enough."""
    if device.type != "cuda":
        return 0, _LARGE_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return torch.cuda.get_device_capability(index)[0], properties["max_shared_mem"]
