"""Step times of a pool: learnt within 200 samples, kept under constant load, followed through a change, stragglers named."""

from dataclasses import replace
from random import Random

import pytest

from tandem.errors import ConfigError
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample
from tandem.step_shape import StepShape
from tandem.steptime import FIRST_COST, StepTime, StepTimeConfig
from tests.step_profiles import Load, Seconds, any_batch, batch_of, distserve_s, h200_s, mape, prompts, sample

PROFILES = pytest.mark.parametrize("seconds", [h200_s, distserve_s])
STEADY, OTHER = batch_of(32, 1000), batch_of(128, 1500)


class _Pool:
    """A pool of replicas that report one step each in turn, 50 a second."""

    def __init__(self, seconds: Seconds, *, replicas: int = 1, config: StepTimeConfig | None = None) -> None:
        self.times = StepTime(FIRST_COST, config)
        self.seconds = seconds
        self.replicas = [f"r{index}" for index in range(replicas)]
        self.slowdown = dict.fromkeys(self.replicas, 1.0)
        self.rng = Random(7)
        self.now_s = 0.0

    def run(self, load: Load, samples: int) -> None:
        for index in range(samples):
            self.now_s += 0.02
            replica_id = self.replicas[index % len(self.replicas)]
            step = sample(self.seconds, load, self.rng, slowdown=self.slowdown[replica_id])
            self.times.observe(replica_id, step, self.now_s)

    def slow_all(self, factor: float) -> None:
        self.slowdown = dict.fromkeys(self.replicas, factor)

    def named(self) -> list[str]:
        return [straggler.replica_id for straggler in self.times.stragglers]

    def error(self, load: Load, replica_id: str = "r0") -> float:
        bias = self.times.bias(replica_id)
        return mape(self.times.cost, bias, self.seconds, load, Random(8), slowdown=self.slowdown[replica_id])


@PROFILES
@pytest.mark.parametrize("load", [prompts, any_batch])
def test_200_samples_are_enough_for_5_percent(seconds: Seconds, load: Load) -> None:
    pool = _Pool(seconds)
    pool.run(load, 200)
    assert pool.error(load) <= 0.05


@PROFILES
def test_a_constant_load_and_then_another_are_known_to_5_percent(seconds: Seconds) -> None:
    pool = _Pool(seconds)
    pool.run(STEADY, 200)
    assert pool.error(STEADY) <= 0.05
    pool.run(OTHER, 200)
    assert pool.error(OTHER) <= 0.05


@PROFILES
def test_an_hour_of_constant_load_does_not_wash_out_another(seconds: Seconds) -> None:
    pool = _Pool(seconds)
    pool.run(OTHER, 200)
    pool.run(STEADY, 5000)
    assert pool.error(OTHER) <= 0.05


@PROFILES
def test_a_fleet_that_turns_slower_is_known_again_after_200_samples(seconds: Seconds) -> None:
    pool = _Pool(seconds, replicas=4)
    pool.run(any_batch, 1000)
    pool.slow_all(2.0)
    assert pool.error(any_batch) > 0.4
    pool.run(any_batch, 200)
    assert pool.error(any_batch) <= 0.05


@PROFILES
def test_loads_not_seen_since_the_fleet_turned_slower_are_scaled_along(seconds: Seconds) -> None:
    pool = _Pool(seconds, replicas=4)
    pool.run(any_batch, 1000)
    pool.slow_all(2.0)
    pool.run(STEADY, 300)
    assert pool.error(any_batch) <= 0.15


def test_a_fleet_that_turns_faster_is_followed_too() -> None:
    pool = _Pool(h200_s, replicas=2)
    pool.run(any_batch, 1000)
    pool.slow_all(0.4)
    pool.run(any_batch, 200)
    assert pool.error(any_batch) <= 0.05


def test_its_own_error_says_how_well_it_predicts() -> None:
    pool = _Pool(h200_s, config=StepTimeConfig(error_window=100))
    pool.run(any_batch, 500)
    assert 0.01 < pool.times.error < 0.05  # noise of 3 %
    assert 1.0 < pool.times.p90_ratio < 1.15
    pool.slow_all(2.0)
    pool.run(any_batch, 10)
    assert pool.times.error > 0.05


def test_a_cold_model_predicts_by_its_prior() -> None:
    times = StepTime()
    assert (times.cost, times.error, times.p90_ratio, times.bias("r")) == (FIRST_COST, 0.0, 1.0, 1.0)
    assert not times.is_ready
    assert not times.has_prefill
    assert not times.has_decode


def test_what_was_seen_says_what_is_known() -> None:
    pool = _Pool(h200_s)
    pool.run(any_batch, 40)
    assert pool.times.is_ready
    assert pool.times.has_decode
    assert not pool.times.has_prefill
    pool.run(prompts, 60)
    assert pool.times.has_prefill
    assert pool.times.observations == 100


def test_the_tails_of_hand_offs_do_not_tell_what_a_prompt_costs() -> None:
    pool = _Pool(h200_s)
    pool.run(lambda rng: (rng.randint(1, 31), 1000, 8, 8000), 200)
    assert not pool.times.has_prefill


def test_a_slow_replica_is_predicted_slow_and_named_after_a_while() -> None:
    pool = _Pool(h200_s, replicas=4)
    pool.run(any_batch, 400)
    pool.slowdown["r2"] = 1.6
    turned_s = pool.now_s
    pool.run(any_batch, 700)  # 14 s
    assert pool.named() == []
    pool.run(any_batch, 300)
    assert pool.times.bias("r2") / pool.times.bias("r0") == pytest.approx(1.6, rel=0.1)
    pool.run(any_batch, 1000)
    (straggler,) = pool.times.stragglers
    assert straggler.replica_id == "r2"
    assert straggler.slowdown == pytest.approx(1.6, rel=0.1)
    assert turned_s < straggler.since_s < turned_s + 5.0
    assert pool.error(any_batch, "r2") <= 0.06


def test_one_that_works_seldom_is_named_as_soon() -> None:
    pool = _Pool(h200_s, replicas=4)
    pool.run(any_batch, 400)
    turned_s = pool.now_s
    for _ in range(12):  # two seconds each
        pool.replicas = ["r0", "r1", "r3"]
        pool.run(any_batch, 99)
        pool.replicas, pool.slowdown["r2"] = ["r2"], 2.0
        pool.run(any_batch, 1)
    assert pool.named() == ["r2"]
    assert pool.now_s < turned_s + 25.0


def test_moments_a_little_below_the_threshold_begin_no_new_wait() -> None:
    pool = _Pool(h200_s, replicas=4)
    pool.run(any_batch, 400)
    turned_s = pool.now_s
    for _ in range(9):  # a second slow, one less so: never as quick as the others
        for pool.slowdown["r2"] in (1.8, 1.2):
            pool.run(any_batch, 50)
    pool.slowdown["r2"] = 1.6
    pool.run(any_batch, 250)
    assert pool.named() == ["r2"]
    assert pool.times.stragglers[0].since_s < turned_s + 5.0


def test_who_is_a_little_slower_for_long_is_not_named() -> None:
    pool = _Pool(h200_s, replicas=4)
    pool.slowdown["r2"] = 1.22
    pool.run(any_batch, 3000)
    assert pool.named() == []


def test_a_straggler_that_recovers_is_named_no_more() -> None:
    pool = _Pool(h200_s, replicas=2)
    pool.slowdown["r1"] = 1.8
    pool.run(any_batch, 3000)
    assert pool.named() == ["r1"]
    pool.slowdown["r1"] = 1.2  # above what it needs to be let go
    pool.run(any_batch, 1000)
    assert pool.named() == ["r1"]
    pool.slowdown["r1"] = 1.0
    pool.run(any_batch, 1000)
    assert pool.named() == []


def test_a_replica_that_gets_no_work_is_forgiven() -> None:
    pool = _Pool(h200_s, replicas=3)
    pool.slowdown["r1"] = 1.8
    pool.run(any_batch, 5000)
    assert pool.named() == ["r1"]
    pool.replicas = ["r0", "r2"]
    pool.run(any_batch, 9000)  # 180 s
    assert pool.named() == []
    assert pool.times.bias("r1") < 1.2


def test_a_replica_that_is_gone_is_forgotten() -> None:
    pool = _Pool(h200_s, replicas=2)
    pool.slowdown["r1"] = 1.8
    pool.run(any_batch, 3000)
    pool.times.forget("r1")
    assert pool.named() == []
    assert pool.times.bias("r1") == 1.0


def test_replicas_are_bounded() -> None:
    pool = _Pool(h200_s, replicas=9, config=StepTimeConfig(max_replicas=8))
    pool.run(any_batch, 600)
    assert sum(pool.times.bias(replica_id) != 1.0 for replica_id in pool.replicas) <= 8


def test_old_loads_fade_with_time() -> None:
    pool = _Pool(h200_s, config=StepTimeConfig(fade_half_life_s=20.0))
    pool.run(any_batch, 2000)
    assert pool.error(any_batch) <= 0.05


def test_a_pause_of_a_machine_bends_nothing() -> None:
    pool = _Pool(h200_s)
    pool.run(any_batch, 300)
    before = pool.error(any_batch)
    pool.times.observe("r0", replace(sample(h200_s, any_batch, pool.rng), duration_s=30.0), pool.now_s)
    pool.run(any_batch, 40)
    assert pool.error(any_batch) <= before + 0.1


def test_a_step_of_no_duration_is_taken_as_the_shortest() -> None:
    times = StepTime()
    for index in range(100):
        empty = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=0, kv_tokens=0, duration_s=0.0)
        times.observe("r", empty, index / 50)
    assert 0.0 <= times.cost.base_s < 1e-4


def test_kinds_of_steps_remembered_are_bounded() -> None:
    shape, rng = StepShape(FIRST_COST), Random(3)
    for exponent in range(14):
        for _ in range(40):
            load = (rng.randint(0, 2**exponent), rng.randint(0, 2**exponent), rng.randint(0, 2**exponent), rng.randint(0, 2**exponent))
            shape.observe(sample(h200_s, lambda _, load=load: load, rng))  # type: ignore[misc]
    assert shape.buckets == 64
    assert mape(shape.cost, 1.0, h200_s, prompts, rng) < 0.1


def test_a_shape_is_rescaled_as_a_whole() -> None:
    shape, rng = StepShape(StepCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9, request_s=1e-4, kv_token_s=1e-8)), Random(4)
    for _ in range(300):
        shape.observe(sample(h200_s, any_batch, rng))
    before_s = shape.cost.decode_s(64, 64_000)
    shape.rescale(2.0)
    assert shape.cost.decode_s(64, 64_000) == pytest.approx(2 * before_s, rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        StepTimeConfig(min_bias=1.5),
        StepTimeConfig(straggler_clear_ratio=1.4),
        StepTimeConfig(straggler_ratio=3.0),
        StepTimeConfig(review_s=0.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: StepTimeConfig) -> None:
    with pytest.raises(ConfigError):
        wrong.validate()


def test_the_defaults_are_valid() -> None:
    StepTimeConfig().validate()
