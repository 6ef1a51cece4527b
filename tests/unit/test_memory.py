"""Peak memory: that a peak is seen, and in GiB."""

from __future__ import annotations

import pytest
import torch

from lemo.memory import PeakTracker


def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    tracker = PeakTracker("cpu")
    tracker.reset()
    before = tracker.read()
    assert before.peak_reserved_gib is None
    ballast = torch.ones(int(before.peak_gib * 2**30) // 4 + 2**24)
    after = tracker.read()
    assert after.peak_gib - before.peak_gib >= 2**26 / 2**30 * 0.5
    del ballast
    assert tracker.read().peak_gib >= after.peak_gib


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_that_since_the_reset(device: torch.device) -> None:
    tracker = PeakTracker(device)
    big = torch.empty(2**28, dtype=torch.uint8, device=device)
    del big
    tracker.reset()
    start = tracker.read().peak_gib
    small = torch.empty(2**26, dtype=torch.uint8, device=device)
    peak = tracker.read()
    assert peak.peak_gib - start == pytest.approx(2**26 / 2**30, rel=1e-3)
    assert peak.peak_reserved_gib is not None
    assert peak.peak_reserved_gib >= peak.peak_gib
    del small
