"""Whatever is fed, predictions stay non-negative, ordered, monotone in work, and bounded in memory; and intervals cover what they say."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.interval import Calibration
from router.output_length import LengthKey, OutputLengthConfig, OutputLengths
from router.pool_times import PoolKey, PoolTimes, PoolTimesConfig
from tandem.histogram import LogHistogram, geometric_edges, mixture, whole_edges
from tandem.least_squares import solve_non_negative
from tandem.rolling import RollingMean, RollingQuantile
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample
from tandem.steptime import StepTime, StepTimeConfig

COEFFICIENT = st.floats(0.0, 1.0)
COSTS = st.builds(StepCost, base_s=COEFFICIENT, token_s=COEFFICIENT, pair_s=COEFFICIENT, request_s=COEFFICIENT, kv_token_s=COEFFICIENT)
TOKENS = st.integers(0, 100_000)
ELAPSED = st.none() | st.floats(-1.0, 1e6)
SAMPLES = st.builds(
    StepSample,
    prefill_tokens=TOKENS,
    prefill_pairs=st.integers(0, 10**10),
    decode_requests=st.integers(0, 2000),
    kv_tokens=st.integers(0, 10**7),
    duration_s=st.floats(-1.0, 1e4),
)


@given(COSTS, st.lists(TOKENS, min_size=2, max_size=6), TOKENS, st.integers(1, 9000), st.integers(0, 500), ELAPSED)
def test_time_to_finish_grows_with_own_and_with_pending_tokens(
    cost: StepCost, tokens: list[int], others: int, chunk: int, requests: int, elapsed_s: float | None
) -> None:
    tokens.sort()
    own = [cost.finish_s(count, 0, chunk, others, 0, requests, 0, elapsed_s) for count in tokens]
    pending = [cost.finish_s(others, 0, chunk, count, 0, requests, 0, elapsed_s) for count in tokens]
    for seconds in (own, pending):
        assert seconds[0] >= 0.0
        assert all(low <= high * (1 + 1e-9) + 1e-12 for low, high in pairwise(seconds))


@given(COSTS, TOKENS, st.lists(st.floats(0.0, 100.0), min_size=2, max_size=5), st.integers(0, 500))
def test_what_has_passed_of_a_step_is_not_waited_for(cost: StepCost, pending: int, elapsed: list[float], requests: int) -> None:
    elapsed.sort()
    waits = [cost.finish_s(0, 0, 2048, pending, 0, requests, 0, elapsed_s) for elapsed_s in elapsed]
    assert all(late <= early + 1e-9 for early, late in pairwise(waits))


@given(COSTS, st.integers(1, 500), TOKENS, st.lists(TOKENS, min_size=2, max_size=6), st.floats(1, 1e4))
def test_seconds_per_token_grow_with_pending_prompts(
    cost: StepCost, requests: int, kv_tokens: int, pending: list[int], output_tokens: float
) -> None:
    pending.sort()
    seconds = [cost.tpot_s(requests, kv_tokens, output_tokens=output_tokens, pending_tokens=count, chunk_tokens=2048) for count in pending]
    assert seconds[0] >= cost.decode_s(requests, kv_tokens)
    assert all(low <= high * (1 + 1e-9) + 1e-12 for low, high in pairwise(seconds))


@given(st.lists(st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4), min_size=1, max_size=12), st.lists(st.floats(0.0, 3.0), min_size=4))
def test_the_solution_is_the_best_one_without_negative_parts(rows: list[list[float]], last: list[float]) -> None:
    hold = 1e-3
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(4)] for i in range(4)]
    moment = [sum(row[i] for row in rows) for i in range(4)]
    found = solve_non_negative(gram, moment, last[:4], hold)
    for i in range(4):
        weight = max(hold * gram[i][i], 1e-9)
        slope = moment[i] + weight * last[i] - weight * found[i] - sum(g * x for g, x in zip(gram[i], found, strict=True))
        scale = gram[i][i] + weight
        assert found[i] >= 0.0
        assert slope <= 1e-5 * scale + 1e-9
        assert found[i] * slope >= -1e-5 * scale * max(1.0, found[i])


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), SAMPLES, st.floats(0.0, 50.0)), max_size=60))
def test_step_times_stay_finite_and_bounded_whatever_is_measured(events: list[tuple[str, StepSample, float]]) -> None:
    config = StepTimeConfig(warm_samples=4, max_replicas=2)
    times = StepTime(config=config)
    for replica_id, step, now_s in events:
        times.observe(replica_id, step, now_s)
        cost = times.cost
        for coefficient in (cost.base_s, cost.token_s, cost.pair_s, cost.request_s, cost.kv_token_s):
            assert 0.0 <= coefficient < float("inf")
        assert all(config.min_bias <= times.bias(name) <= config.max_bias for name in "abc")
        assert times.error >= 0.0
        assert 0.0 < times.p90_ratio < float("inf")
        assert {straggler.replica_id for straggler in times.stragglers} <= set("abc")


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(SAMPLES, max_size=4)), max_size=20))
def test_pools_are_bounded_whatever_reports_come(reports: list[tuple[int, list[StepSample]]]) -> None:
    pools = PoolTimes(PoolTimesConfig(max_pools=3))
    for index, samples in reports:
        pool = PoolKey(f"m{index % 4}", "h", ("prefill", "decode")[index % 2])
        pools.observe(pool, "r", samples, 0.0)
        assert pools.cost(pool).decode_s(1, 1) >= 0.0
        assert len(pools.reports()) <= 3


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**6), st.integers(-1, 10**6), st.none() | st.integers(0, 5000)), max_size=60),
    st.integers(0, 3000),
    st.none() | st.integers(1, 4000),
    st.none() | st.integers(0, 4000),
)
def test_output_estimates_are_ordered_capped_and_bounded(
    events: list[tuple[int, int, int, int | None]], produced: int, max_tokens: int | None, expected: int | None
) -> None:
    lengths = OutputLengths(OutputLengthConfig(max_sessions=4, max_bins=4, max_tenants=4, max_models=4))
    for name, prompt_tokens, output_tokens, hint in events:
        key = LengthKey(f"m{name % 6}", f"t{name % 5}", f"s{name}", prompt_tokens)
        lengths.observe(key, output_tokens, expected_tokens=hint)
        assert lengths.keys <= 16
        estimate = lengths.estimate(key, produced_tokens=produced, max_tokens=max_tokens, expected_tokens=expected)
        left = 131_072 if max_tokens is None else max(0, max_tokens - produced)
        assert 0.0 <= estimate.mean_tokens <= left
        assert 0.0 <= estimate.p50_tokens <= estimate.p90_tokens <= left


@given(st.lists(st.floats(0.1, 2e4), min_size=1, max_size=80), st.lists(st.floats(0.1, 2e4), min_size=1, max_size=80), st.booleans())
def test_quantiles_rise_and_merged_histograms_lie_between(one: list[float], other: list[float], is_whole: bool) -> None:
    edges = whole_edges(10_000, 64) if is_whole else geometric_edges(1.0, 10_000.0, 64)
    histograms = [LogHistogram(edges, is_whole=is_whole) for _ in range(2)]
    for histogram, values in zip(histograms, (one, other), strict=True):
        for value in values:
            histogram.observe(value)
    means = [mixture([(histogram, 1.0)]).mean() for histogram in histograms]
    histograms[0].merge(histograms[1])
    merged = mixture([(histograms[0], 1.0)])
    assert min(means) * (1 - 1e-9) <= merged.mean() <= max(means) * (1 + 1e-9)
    quantiles = merged.quantiles(0.0, 0.25, 0.5, 0.9, 1.0)
    assert quantiles == sorted(quantiles)
    assert edges[0] <= quantiles[0] <= quantiles[-1] <= edges[-1]
    rest = merged.beyond(100)
    if rest is not None:
        assert rest.mean() >= 99.9
        assert rest.quantiles(0.5)[0] >= 100 or is_whole


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 10))
def test_windows_equal_what_is_recomputed(values: list[float], size: int) -> None:
    quantile, mean = RollingQuantile(size), RollingMean(size)
    for index, value in enumerate(values):
        quantile.add(value)
        mean.add(value)
        last = sorted(values[max(0, index + 1 - size) : index + 1])
        assert len(quantile) == len(mean) == len(last)
        assert quantile.quantile(0.0) == last[0]
        assert quantile.quantile(1.0) == last[-1]
        assert mean.mean == pytest.approx(sum(last) / len(last), abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.05, 0.8), st.floats(0.3, 3.0))
def test_intervals_cover_nine_in_ten_under_exchangeable_noise(seed: int, sigma: float, bias: float) -> None:
    calibration, rng, covered = Calibration(), Random(seed), 0
    for index in range(1200):
        mean = rng.uniform(0.01, 1.0)
        actual = bias * mean * rng.lognormvariate(0.0, sigma)
        covered += index >= 200 and actual <= calibration.upper(mean)
        calibration.observe(mean, actual)
    assert 0.86 <= covered / 1000 <= 0.94
