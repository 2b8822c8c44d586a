"""Pools learn apart, and lend each other what one of them has not seen."""

from random import Random

import pytest

from router.pool_times import PoolKey, PoolTimes, PoolTimesConfig
from tandem.errors import ConfigError
from tandem.steptime import FIRST_COST
from tests.step_profiles import Load, Seconds, any_batch, distserve_s, h200_s, mape, prompts, sample

PREFILL, DECODE = PoolKey("m", "h200", "prefill"), PoolKey("m", "h200", "decode")
OTHER_HARDWARE, OTHER_MODEL = PoolKey("m", "a100", "prefill"), PoolKey("n", "h200", "prefill")


def _feed(pools: PoolTimes, pool: PoolKey, load: Load, seconds: Seconds = h200_s, *, count: int = 200) -> None:
    rng = Random(3)
    for index in range(0, count, 10):
        pools.observe(pool, "r0", [sample(seconds, load, rng) for _ in range(10)], 100.0 + index / 50)


def test_a_pool_that_was_never_seen_has_the_prior() -> None:
    pools = PoolTimes()
    assert pools.cost(PREFILL) == FIRST_COST
    assert pools.bias(PREFILL, "r0") == 1.0
    assert not pools.is_ready(PREFILL)
    assert pools.reports() == ()
    pools.forget_replica(PREFILL, "r0")


def test_a_decode_pool_knows_prefill_from_the_prefill_pool() -> None:
    pools = PoolTimes()
    _feed(pools, DECODE, any_batch)
    _feed(pools, PREFILL, prompts)
    cost = pools.cost(DECODE)
    assert cost.token_s == pools.cost(PREFILL).token_s
    assert mape(cost, 1.0, h200_s, any_batch, Random(4)) < 0.05
    assert 10_000 * cost.token_s == pytest.approx(0.152, rel=0.1)
    assert pools.cost(DECODE) is cost


def test_what_was_borrowed_is_renewed() -> None:
    pools = PoolTimes()
    _feed(pools, PREFILL, prompts)
    before = pools.cost(PREFILL)
    _feed(pools, DECODE, any_batch)
    _feed(pools, PREFILL, prompts, count=70)
    after = pools.cost(PREFILL)
    assert after.request_s == pools.cost(DECODE).request_s != before.request_s


def test_a_pool_that_has_seen_both_borrows_nothing() -> None:
    pools = PoolTimes()
    _feed(pools, DECODE, any_batch)
    _feed(pools, PREFILL, lambda rng: rng.choice((prompts, any_batch))(rng))
    assert pools.cost(PREFILL).request_s != pools.cost(DECODE).request_s


def test_a_new_pool_starts_as_its_siblings_are() -> None:
    pools = PoolTimes()
    _feed(pools, OTHER_HARDWARE, prompts, distserve_s)
    assert pools.cost(DECODE).token_s == pools.cost(OTHER_HARDWARE).token_s
    _feed(pools, PREFILL, prompts)
    cost = pools.cost(DECODE)
    assert (cost.base_s, cost.token_s) == (pools.cost(PREFILL).base_s, pools.cost(PREFILL).token_s)
    assert pools.cost(OTHER_MODEL) == FIRST_COST


def test_a_report_says_what_is_known() -> None:
    pools = PoolTimes()
    _feed(pools, PREFILL, prompts)
    _feed(pools, DECODE, any_batch, count=10)
    decode, prefill = pools.reports()
    assert (decode.pool, decode.is_ready, decode.observations) == (DECODE, False, 10)
    assert (prefill.pool, prefill.is_ready, prefill.stragglers) == (PREFILL, True, ())
    assert 0.0 < prefill.error < 0.1
    assert prefill.p90_ratio > 1.0
    assert pools.is_ready(PREFILL)
    pools.forget_replica(PREFILL, "r0")
    assert pools.bias(PREFILL, "r0") == 1.0


def test_samples_beyond_the_limit_are_skipped_the_oldest_first() -> None:
    pools, rng = PoolTimes(PoolTimesConfig(max_samples_per_s=100.0)), Random(5)
    pools.observe(PREFILL, "r0", [sample(h200_s, prompts, rng) for _ in range(250)], 0.0)
    assert pools.skipped_samples_total == 150
    pools.observe(PREFILL, "r0", [sample(h200_s, prompts, rng) for _ in range(30)], 0.2)
    pools.observe(PREFILL, "r0", [sample(h200_s, prompts, rng) for _ in range(30)], 0.1)
    assert pools.skipped_samples_total == 190
    assert pools.reports()[0].observations == 120


def test_pools_are_bounded() -> None:
    pools = PoolTimes(PoolTimesConfig(max_pools=3))
    for index in range(10):
        pool = PoolKey(f"m{index}", "h", "prefill")
        _feed(pools, pool, any_batch, count=10)
        pools.cost(pool)
    assert len(pools.reports()) == 3


def test_settings_that_make_no_sense_are_refused() -> None:
    PoolTimesConfig().validate()
    with pytest.raises(ConfigError):
        PoolTimesConfig(max_pools=0).validate()
