"""Histograms forget, merge, and answer means and quantiles, whole or beyond a point."""

from itertools import pairwise
from random import Random

import pytest

from tandem.histogram import LogHistogram, geometric_edges, mixture, whole_edges

EDGES = whole_edges(10_000, 64)


def _filled(values: list[float]) -> LogHistogram:
    histogram = LogHistogram(EDGES, decay=1.0, is_whole=True)
    for value in values:
        histogram.observe(value)
    return histogram


def test_small_whole_numbers_have_a_bucket_each() -> None:
    assert EDGES[:8] == (1, 2, 3, 4, 5, 6, 7, 8)
    assert len(EDGES) <= 65
    assert EDGES[-1] == 10_000
    assert sorted(EDGES) == list(EDGES)


def test_geometric_edges_grow_by_one_factor() -> None:
    assert geometric_edges(0.25, 4.0, 4) == pytest.approx((0.25, 0.5, 1.0, 2.0, 4.0))


def test_the_mean_is_exact() -> None:
    assert mixture([(_filled([3, 500, 700]), 1.0)]).mean() == pytest.approx(401.0)


def test_a_limit_cuts_the_values_above_it() -> None:
    assert mixture([(_filled([4, 4, 5000, 5000]), 1.0)]).mean(100) == pytest.approx(52.0)


def test_quantiles_lie_within_their_bucket() -> None:
    histogram = _filled([float(value) for value in range(1, 1001)])
    assert histogram.quantile(0.5) == pytest.approx(500, rel=0.02)
    assert histogram.quantile(0.9) == pytest.approx(900, rel=0.02)
    assert histogram.quantile(0.0) == 1.0
    assert histogram.quantile(1.0) == pytest.approx(1000, rel=0.2)


def test_one_value_is_its_own_quantile() -> None:
    assert _filled([7.0]).quantile(0.9) == 7.0


def test_quantiles_of_fractions_are_interpolated() -> None:
    histogram = LogHistogram(geometric_edges(0.25, 4.0, 64))
    rng = Random(1)
    for _ in range(5000):
        histogram.observe(rng.uniform(0.5, 1.5))
    assert histogram.quantile(0.9) == pytest.approx(1.4, rel=0.03)


def test_values_beyond_the_edges_count_in_the_outermost_buckets() -> None:
    histogram = _filled([0.0, 1e9])
    assert mixture([(histogram, 1.0)]).mean() == pytest.approx((1 + 10_000) / 2)


def test_what_lies_beyond_a_point_is_what_is_left_there() -> None:
    whole = mixture([(_filled([2, 2, 2, 300]), 1.0)])
    rest = whole.beyond(3)
    assert rest is not None
    assert rest.mean() == pytest.approx(300.0)
    assert rest.mass == pytest.approx(0.25)
    assert whole.beyond(0.5) is whole
    assert whole.beyond(9_000) is None
    assert whole.beyond(10_000) is None


def test_a_point_inside_a_bucket_leaves_its_upper_part() -> None:
    low, high = next((low, high) for low, high in pairwise(EDGES) if low > 1000)
    middle = (low + high) // 2
    rest = mixture([(_filled([low]), 1.0)]).beyond(middle)
    assert rest is not None
    assert rest.mean() == pytest.approx((middle + high - 1) / 2)
    assert middle <= rest.quantiles(0.01)[0] <= rest.quantiles(0.99)[0] < high


def test_old_values_are_forgotten() -> None:
    histogram = LogHistogram(EDGES, decay=0.9, is_whole=True)
    for value in [5.0] * 100 + [50.0] * 40:
        histogram.observe(value)
    assert histogram.weight == pytest.approx(10.0, rel=0.01)
    assert histogram.quantile(0.5) == pytest.approx(50, abs=9)


def test_forgetting_never_overflows() -> None:
    histogram = LogHistogram(EDGES, decay=0.5, is_whole=True)
    for _ in range(5000):
        histogram.observe(9.0)
    assert histogram.weight == pytest.approx(2.0)
    assert histogram.quantile(0.5) == 9.0


def test_merging_adds_what_both_remember() -> None:
    one, other = LogHistogram(EDGES, decay=0.99), LogHistogram(EDGES, decay=0.99)
    for _ in range(50):
        one.observe(10.0)
    for _ in range(2000):
        other.observe(100.0)
    weights = one.weight + other.weight
    one.merge(other)
    assert one.weight == pytest.approx(weights)
    assert one.quantile(0.9) == pytest.approx(100, rel=0.2)
    with pytest.raises(ValueError, match="different buckets"):
        one.merge(LogHistogram((1.0, 2.0)))


def test_a_mixture_weighs_by_share_not_by_count() -> None:
    few, many = _filled([10.0]), _filled([1000.0] * 500)
    assert mixture([(few, 0.5), (many, 0.5), (_filled([]), 0.9)]).mean() == pytest.approx(505.0)
    with pytest.raises(ValueError, match="nothing"):
        mixture([(_filled([]), 1.0)])


def test_quantiles_skip_empty_buckets_at_the_end() -> None:
    histogram = _filled([3.0, 3.0, 3.0])
    assert mixture([(histogram, 1 / 3)]).quantiles(1.0 + 1e-12) == [3.0]
