"""How long a simulated step takes, and which profiles are none."""

from dataclasses import replace
from random import Random

import pytest

from tandem.engine.simulated_physics import StepProfile, StepWork
from tandem.errors import ConfigError

NOTHING = StepWork(prefill_tokens=0, prefill_pairs=0, decode_requests=0, kv_tokens=0)
ROUND = StepProfile(base_s=1.0, prefill_token_s=2.0, prefill_pair_s=3.0, decode_request_s=4.0, kv_token_s=5.0)


def test_a_step_is_linear_in_its_work() -> None:
    work = StepWork(prefill_tokens=10, prefill_pairs=100, decode_requests=1000, kv_tokens=10_000)
    assert ROUND.step_s(work, Random(1)) == 1.0 + 20.0 + 300.0 + 4000.0 + 50_000.0
    assert ROUND.step_s(NOTHING, Random(1)) == 1.0


def test_a_slow_replica_takes_a_multiple() -> None:
    assert replace(ROUND, slowdown=2.5).step_s(NOTHING, Random(1)) == 2.5


def test_no_step_takes_no_time() -> None:
    assert StepProfile(base_s=0.0).step_s(NOTHING, Random(1)) > 0.0


def test_noise_is_drawn_anew_and_repeats_with_its_seed() -> None:
    noisy = replace(ROUND, noise_fraction=0.1)
    drawn = [[noisy.step_s(NOTHING, rng) for _ in range(1000)] for rng in (Random(1), Random(1))]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 1000
    assert 0.98 < sum(drawn[0]) / 1000 < 1.03
    assert 0.5 < min(drawn[0]) < 0.9
    assert 1.1 < max(drawn[0]) < 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_s", -1.0),
        ("kv_token_s", float("inf")),
        ("noise_fraction", -0.1),
        ("slowdown", 0.0),
        ("eos_fraction", 1.5),
        ("kv_blocks", 0),
        ("block_bytes", 33),
        ("block_bytes", 0),
    ],
)
def test_a_profile_that_cannot_be_is_refused_by_its_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"here.{key} must be"):
        replace(StepProfile(), **{key: value}).validate("here.")  # type: ignore[arg-type]


def test_the_default_profile_is_valid() -> None:
    StepProfile().validate()
