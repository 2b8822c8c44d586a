"""Trouble is said once, left alone for a while, and tried again by one caller at a time."""

import logging

import pytest

from kv_transfer.outage import Outage


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pauses_s(outage: Outage, clock: Clock, tries: int) -> list[int]:
    """How many whole seconds pass before each further try, all of them in vain."""
    waited = []
    for _ in range(tries):
        waited.append(0)
        while not outage.allows():
            clock.now_s += 1.0
            waited[-1] += 1
        outage.begin("still so")
    return waited


def test_without_trouble_everybody_may_try() -> None:
    outage = Outage("disk", pause_s=2.0, clock=Clock())
    assert outage.allows()
    assert outage.allows()
    assert (outage.error, outage.is_on) == ("", False)


def test_after_a_failure_nobody_tries_until_the_pause_is_over_and_then_one() -> None:
    clock = Clock()
    outage = Outage("disk", pause_s=2.0, clock=clock)
    outage.begin("full")
    assert (outage.error, outage.is_on, outage.allows()) == ("full", True, False)
    clock.now_s += 2.0
    assert outage.allows()
    assert not outage.allows()


def test_pauses_double_up_to_half_a_minute_and_start_anew_after_a_success() -> None:
    clock = Clock()
    outage = Outage("disk", pause_s=2.0, clock=clock)
    outage.begin("full")
    assert pauses_s(outage, clock, 7) == [2, 4, 8, 16, 30, 30, 30]
    outage.end()
    assert outage.allows()
    outage.begin("full")
    assert pauses_s(outage, clock, 2) == [2, 4]


def test_those_who_fail_late_do_not_lengthen_the_pause() -> None:
    clock = Clock()
    outage = Outage("disk", pause_s=2.0, clock=clock)
    for _ in range(10):
        outage.begin("full")
    clock.now_s += 2.0
    assert outage.allows()


def test_a_caller_that_never_says_what_came_of_its_try_delays_the_next_by_one_pause() -> None:
    clock = Clock()
    outage = Outage("disk", pause_s=2.0, clock=clock)
    outage.begin("full")
    clock.now_s += 2.0
    assert outage.allows()
    clock.now_s += 2.0
    assert outage.allows()


def test_an_outage_is_two_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outage = Outage("disk", pause_s=2.0, clock=clock)
    with caplog.at_level(logging.INFO):
        outage.begin("full")
        pauses_s(outage, clock, 3)
        outage.end()
        outage.end()
    assert [record.message for record in caplog.records] == ["kv_tier_trouble tier=disk error=full", "kv_tier_well tier=disk"]
