"""A whole fleet turns twice as slow: predictions lose trust, learn, and are trusted again, while they go on being made."""

from collections import deque
from random import Random

import pytest

from router.interval import Interval, PredictionKind
from router.pool_times import PoolKey
from router.predict import EngineWork, LoadPredictor
from tests.step_profiles import h200_s, prompts, sample

POOL = PoolKey("m", "h200", "prefill")
IN_FLIGHT = 8


class _Fleet:
    """Four replicas; each request is one step, whose sample and outcome arrive when eight more have been dispatched."""

    def __init__(self, sample_every: int) -> None:
        self.predictor = LoadPredictor()
        self.rng = Random(11)
        self.sample_every = sample_every
        self.slowdown = 1.0
        self.requests = 0
        self.flying: deque[tuple[Interval, float]] = deque()

    def request(self) -> bool:
        """Serves one more; whether the model is trusted afterwards."""
        self.requests += 1
        now_s = self.requests / 10
        replica_id = f"r{self.requests % 4}"
        step = sample(h200_s, prompts, self.rng, slowdown=self.slowdown)
        cached_tokens = max(0, round(step.prefill_pairs / step.prefill_tokens - step.prefill_tokens / 2))
        prefill = self.predictor.prefill(
            POOL,
            replica_id,
            EngineWork(chunk_tokens=8192),
            uncached_tokens=step.prefill_tokens,
            cached_tokens=cached_tokens,
        )
        self.flying.append((prefill, step.duration_s + 0.002 * self.rng.random()))
        if len(self.flying) > IN_FLIGHT:
            predicted, actual_s = self.flying.popleft()
            self.predictor.observe(PredictionKind.PREFILL, "m", predicted, actual_s, now_s)
        if self.requests % self.sample_every == 0:
            self.predictor.pools.observe(POOL, replica_id, [step], now_s)
        return self.predictor.scores.is_trusted("m")

    def run(self, count: int) -> list[bool]:
        return [self.request() for _ in range(count)]


@pytest.mark.parametrize("sample_every", [1, 3])
def test_a_fleet_that_turns_twice_as_slow_is_distrusted_within_200_requests_and_trusted_again_after_relearning(sample_every: int) -> None:
    fleet = _Fleet(sample_every)
    fleet.run(1000)
    assert all(fleet.run(500))
    fleet.slowdown = 2.0
    assert not all(fleet.run(200))
    assert fleet.run(800)[-1]
    (score,) = fleet.predictor.scores.scores()
    assert score.mape < 0.1
    assert score.q90_coverage == pytest.approx(0.9, abs=0.08)
    assert all(fleet.run(1000))
