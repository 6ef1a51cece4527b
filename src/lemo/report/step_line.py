"""One line of a step report."""

from __future__ import annotations

from dataclasses import dataclass

from lemo.bench.step_config import STRONG_BASELINE


@dataclass(frozen=True)
class Line:
    """One record, or an extrapolation to full depth from two records with fewer layers. ms, GiB.

    Attributes:
        name: method and setting.
        floor_ms: what the operations that the step needs at least take at the rate of the device's matrix products.
        parts: (part, ms, ms its operations take at the ceiling) of one step, as it goes; empty if not taken.
        step_ms, low_ms, high_ms: median and range; an extrapolation has no range. None where memory ran out.
        tflop, stored_gib, moved_gb: what `lemo.bench.cost` and `lemo.bench.cost_memory` count; None if not counted.
    """

    T: int
    name: str
    keep: float | None
    step_ms: float | None
    low_ms: float | None = None
    high_ms: float | None = None
    peak_gib: float | None = None
    weights_gib: float | None = None
    floor_ms: float | None = None
    parts: tuple[tuple[str, float, float | None], ...] = ()
    tflop: float | None = None
    stored_gib: float | None = None
    moved_gb: float | None = None

    @property
    def is_baseline(self) -> bool:
        return self.name == STRONG_BASELINE

    @property
    def tokens_per_s(self) -> float | None:
        return 1000 * self.T / self.step_ms if self.step_ms else None

    @property
    def of_ceiling(self) -> float | None:
        """Operations a second that the step needs at least / those of the device's matrix products."""
        return self.floor_ms / self.step_ms if self.floor_ms and self.step_ms else None

    @property
    def transient_gib(self) -> float | None:
        """Peak without the weights."""
        return None if self.peak_gib is None or self.weights_gib is None else self.peak_gib - self.weights_gib
