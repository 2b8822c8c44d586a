"""The wait in a worker's line follows from how fast such lines were seen to move."""

import pytest

from router.line_rate import LineRate


def moved(rate: float, intervals: int = 40) -> LineRate:
    """Lines that gave up half a second's work every `0.5 / rate` seconds."""
    line = LineRate()
    for number in range(intervals):
        line.moved(0.5, 0.5 / rate, number * 0.5 / rate)
    return line


def test_before_anything_is_seen_workers_do_what_is_predicted() -> None:
    assert LineRate().wait_s(3.0, 0.0) == 3.0
    assert LineRate().wait_s(0.0, 0.0) == 0.0
    assert LineRate().wait_s(-1.0, 0.0) == 0.0


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_the_rate_that_was_seen_counts(rate: float) -> None:
    assert moved(rate).wait_s(10.0, 20.0 / rate) == pytest.approx(10.0 / rate, rel=0.1)


def test_one_interval_is_judged_by_its_own_work() -> None:
    """The first prompts fill idle workers: their work is not counted against the moment in which they came."""
    line = LineRate()
    line.moved(0.14, 0.14, 0.14)
    assert line.wait_s(5.0, 0.14) == pytest.approx(5.0)


def test_what_was_seen_is_forgotten() -> None:
    line = moved(0.5)
    assert line.wait_s(10.0, 200.0) == pytest.approx(10.0, rel=0.05)


def test_impossible_numbers_and_a_clock_that_goes_back_do_no_harm() -> None:
    line = moved(1.0)
    line.moved(-5.0, -1.0, 3.0)
    assert line.wait_s(10.0, 1.0) == pytest.approx(10.0, rel=0.1)
