"""Times single operations, and what the device can do at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lemo.memory import PeakTracker
from lemo.memory.tracker import GIB

# More than any GPU's L2: what a call reads comes from memory, not from what the last call left. It also takes the
# device longer than the host needs to launch the call.
_FLUSHED_BYTES = 512 * 2**20


def free_memory(device: str) -> None:
    """Gives back what nobody holds any more, so that the next row's peak is its own."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Timed:
    """Calls of one operation; milliseconds, GiB.

    Attributes:
        ms: of each call.
        peak_gib: as `PeakTracker` says.
        above_gib: the peak over what was allocated before, on a GPU.
    """

    ms: tuple[float, ...]
    peak_gib: float
    above_gib: float | None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)


@contextmanager
def timed(device: str) -> Iterator[list[float]]:
    """Seconds until the device has done the work inside, in the list's only place."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    seconds = [0.0]
    start = time.perf_counter()
    yield seconds
    wait()
    seconds[0] = time.perf_counter() - start


def time_calls(run: Callable[[], object], device: str, *, warm_up: int, repeats: int) -> Timed:
    """Times calls one by one, on a GPU by its own clock and with a cold L2.

    Args:
        run: the operation; what it returns is dropped.
        device: where it runs.
        warm_up, repeats: calls before and in the measurement.
    """
    for _ in range(warm_up):
        run()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            with timed(device) as seconds:
                run()
            times.append(1000 * seconds[0])
        return Timed(tuple(times), PeakTracker(device).read().peak_gib, None)
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    tracker = PeakTracker(device)
    tracker.reset()
    held = torch.cuda.memory_allocated(device)
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    peak = tracker.read().peak_gib
    return Timed(tuple(begin.elapsed_time(end) for begin, end in pairs), peak, peak - held / GIB)


def copy_bandwidth(device: str) -> float | None:
    """Bytes a second, read and written, of a large copy on this GPU, the best of ten; None on a CPU."""
    if device == "cpu":
        return None
    source = torch.zeros(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    best = min(time_calls(lambda: target.copy_(source), device, warm_up=2, repeats=10).ms)
    return 2 * source.nbytes / (best / 1000)
