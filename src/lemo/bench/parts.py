"""Where a step's time goes: one step under torch's profiler, its work summed by part and by kind.

Parts are those that the sparse code names (`lemo.sparse.parts`): forward, selection, keys and values, recompute,
compensation, backward, loss, optimizer; what is in none of them is `rest` (embeddings, the last norm; of a model that
leaves nothing out, its layers). Kinds: `attention`; `linears`, matrix products outside attention; `other`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lemo.sparse.parts import PREFIX

REST = "rest"
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"}


def time_parts(step: Callable[[], None], device: str) -> dict[str, float]:
    """Milliseconds of `part kind`, by time on the device (on a CPU: of its operators); idle time is in none.

    Args:
        step: one step; run once.
        device: where it runs.
    """
    on_gpu = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CPU]
    ranges = [event for event in events if event.name.startswith(PREFIX)]
    sums: dict[str, float] = {}
    for event in events:
        microseconds = sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total
        if microseconds:
            name = " ".join(_place(event, ranges))
            sums[name] = sums.get(name, 0.0) + microseconds / 1000
    return sums


def _place(event: Any, ranges: list[Any]) -> tuple[str, str]:
    """(part, kind) of an event, from its own name and those of the events around it.

    A backward started inside a part may run in another thread, where the part isn't around it but its time is: the
    thread that started it waits.
    """
    kind = "other"
    start = event.time_range.start
    while event is not None:
        name = event.name
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX), kind
        if "attention" in name.lower():
            kind = "attention"
        elif kind == "other" and name in _PRODUCTS:
            kind = "linears"
        event = event.cpu_parent
    around = [r for r in ranges if r.time_range.start <= start <= r.time_range.end]
    innermost = max(around, key=lambda r: r.time_range.start, default=None)
    return innermost.name.removeprefix(PREFIX) if innermost else REST, kind
