"""Thresholds that follow."""

from __future__ import annotations

import math

import pytest

from lemo.selection.following import FollowingThresholds


def thresholds() -> FollowingThresholds:
    calibrated = {(0, "attention"): 2.0, (1, "attention"): 0.0, (0, "mlp"): 3.0, (1, "mlp"): 0.5}
    targets = {(0, "attention"): 0.5, (1, "attention"): 1.0, (0, "mlp"): 1.0, (1, "mlp"): 0.25}
    return FollowingThresholds(calibrated, targets)


def step(found: FollowingThresholds, key: tuple[int, str], *keeps: float) -> None:
    for keep in keeps:
        found.observe(key, keep, 0.1)
    found.advance(found.take_seen())


def test_only_what_leaves_something_out_follows() -> None:
    found = thresholds()
    assert found.followed == [(0, "attention"), (1, "mlp")]
    for key in found.calibrated:
        found.observe(key, 0.75, 0.1)
    assert found.of("attention") == (2.0, 0.0), "an observation counts from the next step"
    found.advance(found.take_seen())
    found.advance(found.take_seen())
    assert found.scales == {(0, "attention"): pytest.approx(0.05), (1, "mlp"): pytest.approx(0.1)}
    assert found.of("attention") == (pytest.approx(2 * math.exp(0.05)), 0.0)
    assert found.of("mlp") == (3.0, pytest.approx(0.5 * math.exp(0.1)))


def test_passes_of_a_step_and_ranks_count_alike() -> None:
    one, other = thresholds(), thresholds()
    step(one, (0, "attention"), 0.9, 0.3, 0.9)
    for keep in (0.9, 0.3):
        other.observe((0, "attention"), keep, 0.1)
    first = other.take_seen()
    other.observe((0, "attention"), 0.9, 0.1)
    other.advance(first + other.take_seen())
    assert one.scales == other.scales == {(0, "attention"): pytest.approx(0.2 * 0.2)}


def test_documents_too_short_to_leave_anything_out_say_nothing() -> None:
    found = thresholds()
    found.observe((0, "attention"), 1.0, 1.0)
    found.observe((1, "mlp"), 0.3, 0.25)
    found.advance(found.take_seen())
    assert not found.scales


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_threshold_gets_a_factor_of_four_at_most(keep: float) -> None:
    found = thresholds()
    for _ in range(100):
        step(found, (0, "attention"), keep)
    assert found.of("attention")[0] == pytest.approx(8.0 if keep else 0.5)


def test_a_branch_keeps_what_it_was_calibrated_to_though_scores_drift() -> None:
    """Scores e^-1 times the calibration's, of which a share of 0.5 - 0.3 x lies x over the threshold's logarithm."""
    found = thresholds()
    for _ in range(60):
        step(found, (0, "attention"), 0.5 - 0.3 * (1.0 + found.scales.get((0, "attention"), 0.0)))
    assert found.scales[0, "attention"] == pytest.approx(-1.0, abs=0.05)
