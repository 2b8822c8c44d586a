"""The wait in the queue follows from how fast it was seen to move."""

import pytest

from router.drain_rate import DrainRate


def _drained(rate: float, seconds: int) -> DrainRate:
    """A queue of which a tenth of a second's work leaves `10 * rate` times a second."""
    drain = DrainRate()
    drain.note(is_waiting=True, now_s=0.0)
    for index in range(int(10 * rate * seconds)):
        drain.dispatched(0.1, index / (10 * rate))
    return drain


def test_before_anything_is_seen_the_guess_counts() -> None:
    assert DrainRate().wait_s(6.0, 0.0, 3.0) == pytest.approx(2.0)
    assert DrainRate().wait_s(0.0, 0.0, 3.0) == 0.0


@pytest.mark.parametrize("rate", [0.5, 4.0])
def test_the_rate_that_was_seen_replaces_the_guess(rate: float) -> None:
    assert _drained(rate, 60).wait_s(10.0, 60.0, 2.0) == pytest.approx(10.0 / rate, rel=0.15)


def test_of_two_routers_each_waits_twice_as_long() -> None:
    alone_s, shared_s = _drained(4.0, 60).wait_s(10.0, 60.0, 4.0), _drained(2.0, 60).wait_s(10.0, 60.0, 4.0)
    assert shared_s == pytest.approx(2 * alone_s, rel=0.15)


def test_time_without_a_queue_does_not_count() -> None:
    drain = _drained(4.0, 60)
    before = drain.rate(60.0, 4.0)
    drain.note(is_waiting=False, now_s=60.0)
    drain.dispatched(0.1, 65.0)
    assert drain.rate(70.0, 4.0) == pytest.approx(before, rel=0.1)


def test_a_queue_that_stands_still_is_seen_while_it_stands() -> None:
    drain = _drained(4.0, 60)
    assert drain.wait_s(10.0, 80.0, 4.0) > 3 * drain.wait_s(10.0, 60.0, 4.0)


def test_a_clock_that_goes_back_does_no_harm() -> None:
    drain = _drained(4.0, 60)
    drain.dispatched(0.1, 30.0)
    assert drain.rate(40.0, 4.0) > 0.0


def test_guessed_seconds_count_until_the_first_learnt_ones() -> None:
    drain = DrainRate()
    drain.note(is_waiting=True, now_s=0.0)
    for second in range(1, 11):
        drain.dispatched(0.1, float(second), is_guess=True)
    assert drain.rate(10.0, 1.0) < 0.2
    drain.dispatched(2.0, 10.0)
    for second in range(11, 31):
        drain.dispatched(2.0, float(second))
        drain.dispatched(0.1, float(second), is_guess=True)
    assert drain.rate(30.0, 1.0) == pytest.approx(2.0, rel=0.15)
