"""Thresholds that follow: scores drift while a model trains, and fixed thresholds would keep ever less, or more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# How far a pass that kept everything, or nothing, moves a threshold's logarithm; and how far it gets in all.
_RATE, _LIMIT = 0.2, math.log(4.0)

Key = tuple[int, str]


@dataclass
class FollowingThresholds:
    """What (layer, branch) keeps at least, moved after each training pass towards keeping what it was calibrated to.

    Attributes:
        calibrated: smallest score that is kept, before training; 0 keeps everything, always.
        targets: share of the blocks that it kept then.
        scales: logarithm of the threshold now over the calibrated one; a checkpoint holds them. Ranks have their own,
            since their documents differ.
    """

    calibrated: Mapping[Key, float]
    targets: Mapping[Key, float]
    scales: dict[Key, float] = field(default_factory=dict)
    _observed: dict[Key, float] = field(default_factory=dict)

    def observe(self, key: Key, keep: float) -> None:
        """Notes what a training pass kept, in [0, 1]; it counts from the next `advance`."""
        if self.calibrated.get(key, 0.0) > 0.0 and self.targets[key] < 1.0:
            self._observed[key] = keep

    def advance(self) -> bool:
        """Moves the thresholds by what was observed; whether anything was."""
        moved_any = bool(self._observed)
        for key, keep in self._observed.items():
            moved = self.scales.get(key, 0.0) + _RATE * (keep - self.targets[key])
            self.scales[key] = min(_LIMIT, max(-_LIMIT, moved))
        self._observed.clear()
        return moved_any

    @property
    def branches(self) -> set[str]:
        """Those that have thresholds."""
        return {branch for _, branch in self.calibrated}

    def of(self, branch: str) -> tuple[float, ...]:
        """One branch's thresholds now, by layer."""
        return tuple(
            threshold * math.exp(self.scales.get((layer, name), 0.0))
            for (layer, name), threshold in sorted(self.calibrated.items())
            if name == branch
        )
