"""Thresholds that follow: scores drift while a model trains, and fixed thresholds would keep ever less, or more."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo.types import Key, Mean

# Of the tensors that a checkpoint holds: the calibrated threshold, and the logarithm of the present one over it.
SUFFIX = ".threshold"
# How far a step that kept everything, or nothing, moves a threshold's logarithm; and how far it gets in all.
_RATE, _LIMIT = 0.2, math.log(4.0)


@dataclass
class FollowingThresholds:
    """What (layer, branch) keeps at least, moved after each training step towards keeping what it was calibrated to.

    Attributes:
        calibrated: smallest score that is kept, before training; 0 keeps everything, always.
        targets: share of the blocks that it kept then.
        scales: logarithm of the threshold now over the calibrated one.
    """

    calibrated: Mapping[Key, float]
    targets: Mapping[Key, float]
    scales: dict[Key, float] = field(default_factory=dict)
    # What passes kept since the last step.
    _seen: dict[Key, Mean] = field(default_factory=lambda: defaultdict(Mean))

    @property
    def followed(self) -> list[Key]:
        """Those that leave something out, in order."""
        return sorted(key for key, x in self.calibrated.items() if x > 0.0 and self.targets[key] < 1.0)

    @property
    def branches(self) -> set[str]:
        """Those that have thresholds."""
        return {branch for _, branch in self.calibrated}

    def observe(self, key: Key, keep: float, least: float) -> None:
        """Notes what a training pass kept.

        Args:
            key: layer and branch.
            keep: its share, in [0, 1].
            least: what it would have kept under any threshold: documents so short that this reaches the target say
                nothing.
        """
        if least < self.targets.get(key, 0.0):
            self._seen[key].add(keep)

    def take_seen(self) -> Tensor:
        """[followed, 2] fp64 on the CPU: what passes kept since the last call, summed, and their number."""
        seen = [(self._seen[key].total, self._seen[key].count) for key in self.followed]
        self._seen.clear()
        return torch.tensor(seen, dtype=torch.float64).reshape(-1, 2)

    def advance(self, seen: Tensor) -> None:
        """Moves the thresholds by what was kept on average; `seen` as from `take_seen`, or summed over ranks."""
        for key, (total, passes) in zip(self.followed, seen.tolist(), strict=True):
            if passes:
                moved = self.scales.get(key, 0.0) + _RATE * (total / passes - self.targets[key])
                self.scales[key] = min(_LIMIT, max(-_LIMIT, moved))

    def of(self, branch: str) -> tuple[float, ...]:
        """One branch's thresholds now, by layer."""
        return tuple(
            threshold * math.exp(self.scales.get((layer, name), 0.0))
            for (layer, name), threshold in sorted(self.calibrated.items())
            if name == branch
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""
        pairs = {key: (self.calibrated[key], self.scales.get(key, 0.0)) for key in self.followed}
        return {
            f"{layer}.{branch}{SUFFIX}": torch.tensor(pair, dtype=torch.float64)
            for (layer, branch), pair in pairs.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave.

        Raises:
            ValueError: it is of another calibration.
        """
        mine = dict(zip(self.tensors(), self.followed, strict=True))
        pairs = {name: tensor.tolist() for name, tensor in tensors.items()}
        if {name: calibrated for name, (calibrated, _) in pairs.items()} != {
            name: self.calibrated[key] for name, key in mine.items()
        }:
            raise ValueError("it has other thresholds")
        self.scales = {mine[name]: scale for name, (_, scale) in pairs.items()}
        self._seen.clear()
