"""How the block-sparse kernels run: tiles, warps and stages, by head size, key block and GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """How one kernel runs.

    Attributes:
        lanes: (query, head) pairs of a tile, a power of two.
        keys: most keys of a tile, a power of two; a key block of fewer is a tile.
        warps: of a program.
        stages: tiles in flight, 1 for none beside the one at work.
        by_queries: gradients of keys and values: products of queries and keys have a line a query, and are turned; or
            a line a key, and aren't.
    """

    lanes: int
    keys: int
    warps: int
    stages: int
    by_queries: bool = False


@dataclass(frozen=True)
class Launches:
    """Of the forward, the gradient of queries, and that of keys and values."""

    forward: Launch
    queries: Launch
    keys: Launch


# Rows of a head of at most so many bytes leave room for tiles in flight.
_SMALL_BYTES = 256
_LARGE = Launches(Launch(128, 64, 8, 1), Launch(128, 64, 8, 1), Launch(64, 64, 4, 1))
# By compute capability's first number, 0 for any other, and key block, up to 64 and 128.
_SMALL = {
    (9, 64): Launches(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    (9, 128): Launches(Launch(128, 128, 8, 3), Launch(128, 128, 8, 2), Launch(64, 128, 8, 2)),
    (0, 64): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    (0, 128): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
}


def launches_for(row_bytes: int, key_block: int, device: torch.device) -> Launches:
    """What was found best, or is known to fit.

    Args:
        row_bytes: of a row of one head.
        key_block: tokens of a key block.
        device: of the tensors.
    """
    if row_bytes > _SMALL_BYTES:
        return _LARGE
    return _SMALL[_generation(device), 128 if key_block > 64 else 64]


@functools.cache
def _generation(device: torch.device) -> int:
    return 9 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else 0
