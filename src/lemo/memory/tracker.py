"""Peak memory of a stretch of work, in GiB (2³⁰ bytes). What is measured depends on the device, and is said here."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class PeakMemory:
    """A peak, GiB.

    Attributes:
        peak_gib: on CUDA, what tensors of this process held on the device at most since `PeakTracker.reset`
            (`torch.cuda.max_memory_allocated`). On a CPU, the largest resident set of the whole process since it
            started: weights, code and libraries included, and it can't be reset.
        peak_reserved_gib: on CUDA, what torch's allocator took from the device at most since the reset, so with its
            unused pieces. None on a CPU, where no allocator reports it.
    """

    peak_gib: float
    peak_reserved_gib: float | None


class PeakTracker:
    """Measures peaks on one device.

    Args:
        device: `cpu` or a CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def reset(self) -> None:
        """Starts a new stretch of work; nothing happens on a CPU (see `PeakMemory`)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> PeakMemory:
        """The peak since `reset` (CUDA), or since the process started (CPU)."""
        if self.device.type == "cuda":
            return PeakMemory(
                torch.cuda.max_memory_allocated(self.device) / GIB, torch.cuda.max_memory_reserved(self.device) / GIB
            )
        # ru_maxrss is in KiB, except on macOS, where it is in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB, None)
