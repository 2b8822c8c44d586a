"""Nine in ten outcomes stay below the quantile, under noise of any shape and after a shift."""

from random import Random

import pytest

from router.interval import Calibration


def _coverage(calibration: Calibration, rng: Random, count: int, *, bias: float = 1.0, sigma: float = 0.5) -> float:
    covered = 0
    for _ in range(count):
        mean = rng.uniform(0.01, 2.0)
        actual = mean * bias * rng.lognormvariate(0.0, sigma)
        covered += actual <= calibration.upper(mean)
        calibration.observe(mean, actual)
    return covered / count


def test_coverage_is_what_was_asked_for() -> None:
    calibration, rng = Calibration(), Random(1)
    _coverage(calibration, rng, 200)
    assert _coverage(calibration, rng, 4000) == pytest.approx(0.9, abs=0.015)
    assert calibration.outcomes == 500


def test_another_target_is_kept_as_well() -> None:
    calibration, rng = Calibration(target=0.75), Random(2)
    _coverage(calibration, rng, 200)
    assert _coverage(calibration, rng, 4000) == pytest.approx(0.75, abs=0.02)


def test_before_there_are_outcomes_the_quantile_is_a_guess_above_the_mean() -> None:
    calibration = Calibration()
    assert calibration.upper(1.0) == pytest.approx(1.5, rel=0.01)
    for _ in range(19):
        calibration.observe(1.0, 3.0)
    assert calibration.multiplier == 1.5
    calibration.observe(1.0, 3.0)
    assert calibration.multiplier == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("bias", [0.5, 2.0])
def test_coverage_comes_back_within_200_outcomes_of_a_shift(bias: float) -> None:
    calibration, rng = Calibration(), Random(3)
    _coverage(calibration, rng, 1000, sigma=0.2)
    _coverage(calibration, rng, 200, sigma=0.2, bias=bias)
    assert _coverage(calibration, rng, 500, sigma=0.2, bias=bias) == pytest.approx(0.9, abs=0.05)


def test_what_is_predicted_as_nothing_has_a_quantile_too() -> None:
    calibration = Calibration(floor=0.01)
    for _ in range(100):
        calibration.observe(0.0, 0.02)
    assert calibration.upper(0.0) == pytest.approx(0.02)


def test_a_quantile_is_never_below_zero() -> None:
    calibration = Calibration(floor=0.01)
    for _ in range(100):
        calibration.observe(1.0, 0.0)
    assert calibration.upper(0.0) == 0.0
