"""Who goes first in an engine."""

from tandem.urgency import begun_priority, engine_priority


def test_the_class_goes_before_all_else() -> None:
    assert engine_priority(-1, -5.0, 100.0) < begun_priority(0) < begun_priority(1)


def test_within_a_class_what_has_begun_goes_first_and_what_is_late_last() -> None:
    assert begun_priority(0) < engine_priority(0, 0.0, 0.0) < engine_priority(0, 9.0, 0.0) < engine_priority(0, -0.1, 0.0)


def test_the_same_moment_is_the_same_whenever_it_is_said() -> None:
    assert engine_priority(0, 5.0, 100.0) == engine_priority(0, 3.0, 102.0) < engine_priority(0, 3.1, 102.0)


def test_every_class_fits_into_64_bits() -> None:
    for priority in (-(2**31), 2**31 - 1):
        for slack_s in (1e9, 1.7e308, -1.7e308):
            assert abs(engine_priority(priority, slack_s, 1e9)) < 2**63
