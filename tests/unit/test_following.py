"""Thresholds that follow."""

from __future__ import annotations

import math

import pytest

from lemo.selection.following import FollowingThresholds


def thresholds() -> FollowingThresholds:
    calibrated = {(0, "attention"): 2.0, (1, "attention"): 0.0, (0, "mlp"): 3.0, (1, "mlp"): 0.5}
    targets = {(0, "attention"): 0.5, (1, "attention"): 1.0, (0, "mlp"): 1.0, (1, "mlp"): 0.25}
    return FollowingThresholds(calibrated, targets)


def test_only_what_leaves_something_out_follows() -> None:
    found = thresholds()
    assert not found.advance()
    for key in found.calibrated:
        found.observe(key, 0.75)
    assert found.of("attention") == (2.0, 0.0), "an observation counts from the next pass"
    assert found.advance()
    assert not found.advance()
    assert found.scales == {(0, "attention"): pytest.approx(0.05), (1, "mlp"): pytest.approx(0.1)}
    assert found.of("attention") == (pytest.approx(2 * math.exp(0.05)), 0.0)
    assert found.of("mlp") == (3.0, pytest.approx(0.5 * math.exp(0.1)))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_threshold_gets_a_factor_of_four_at_most(keep: float) -> None:
    found = thresholds()
    for _ in range(100):
        found.observe((0, "attention"), keep)
        found.advance()
    assert found.of("attention")[0] == pytest.approx(8.0 if keep else 0.5)


def test_a_branch_keeps_what_it_was_calibrated_to_though_scores_drift() -> None:
    """Scores e^x times the calibration's, of which a share of 0.5 - 0.3 x lies over the threshold."""
    found = thresholds()
    for _ in range(60):
        found.observe((0, "attention"), 0.5 - 0.3 * (1.0 + found.scales.get((0, "attention"), 0.0)))
        found.advance()
    assert found.scales[0, "attention"] == pytest.approx(-1.0, abs=0.05)
