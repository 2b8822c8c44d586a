"""Windows of the last so many values."""

from random import Random

import pytest

from tandem.lru import Lru
from tandem.rolling import RollingMean, RollingQuantile


def test_a_quantile_is_of_the_last_values_only() -> None:
    window = RollingQuantile(3)
    for value in (100.0, 1.0, 3.0, 2.0):
        window.add(value)
    assert len(window) == 3
    assert window.quantile(0.5) == 2.0
    assert window.quantile(0.99) == 3.0
    assert window.quantile(0.0) == 1.0


def test_an_empty_window_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="no values"):
        RollingQuantile(3).quantile(0.5)


def test_a_new_value_exceeds_the_quantile_as_often_as_it_says() -> None:
    rng, window, within = Random(2), RollingQuantile(500), 0
    for index in range(5500):
        value = rng.expovariate(1.0)
        if index >= 500:
            within += value <= window.quantile(0.9)
        window.add(value)
    assert within / 5000 == pytest.approx(0.9, abs=0.02)


def test_a_mean_is_of_the_last_values_only() -> None:
    window = RollingMean(2)
    assert window.mean == 0.0
    for value in (1e18, 1.0, 2.0, 4.0, 6.0):
        window.add(value)
    assert (len(window), window.mean) == (2, 5.0)


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    made: Lru[str, list[int]] = Lru(2, list)
    made.obtain("a").append(1)
    made.obtain("b").append(2)
    made.obtain("a")
    made.obtain("c")
    assert list(made) == ["a", "c"]
    assert made.get("b") is None
    assert made.evicted_total == 1
    made.get("a")
    assert [key for key, _ in made.items()] == ["c", "a"]
    made.discard("a")
    made.discard("a")
    assert len(made) == 1


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Lru(0, list)
