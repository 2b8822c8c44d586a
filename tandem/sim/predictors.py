"""Predictors for disturbances and ablations: one that errs, one that knows. Must not be used outside the simulator."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from random import Random

from router.pool_times import PoolKey, PoolTimes
from router.predict import LoadPredictor
from tandem.domain import Role
from tandem.sim.engine_profile import EngineProfile
from tandem.step_cost import StepCost


class NoisyPredictor(LoadPredictor):
    """Whatever is predicted of engine work is wrong by a log-normal factor of median 1, drawn anew for each piece of work it is asked for.

    Of one decision, replicas of a pool that would have the same to compute share one prediction, and its error; work that waits or
    runs keeps the error it was predicted with.
    """

    def __init__(self, sigma: float, rng: Random) -> None:
        super().__init__()
        self.pools = _NoisyPools(sigma, rng)


class TrueModel(LoadPredictor):
    """Knows the engines' coefficients and learns none: what a perfect fit would bring."""

    def __init__(self, profile: EngineProfile) -> None:
        super().__init__()
        self.pools = _TruePools(profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoisyCost(StepCost):
    """As learnt, times noise."""

    noise: Callable[[], float]

    def finish_s(
        self,
        own_tokens: float,
        own_pairs: float,
        chunk_tokens: int,
        pending_tokens: float = 0,
        pending_pairs: float = 0,
        requests: float = 0,
        kv_tokens: float = 0,
        elapsed_s: float | None = None,
    ) -> float:
        """As learnt, times noise."""
        learnt_s = StepCost.finish_s(
            self, own_tokens, own_pairs, chunk_tokens, pending_tokens, pending_pairs, requests, kv_tokens, elapsed_s
        )
        return self.noise() * learnt_s

    def decode_s(self, requests: float, kv_tokens: float) -> float:
        """As learnt, times noise: of `tpot_s` too."""
        return self.noise() * StepCost.decode_s(self, requests, kv_tokens)


class _NoisyPools(PoolTimes):
    """Costs that err."""

    def __init__(self, sigma: float, rng: Random) -> None:
        super().__init__()
        self._sigma = sigma
        self._rng = rng

    def cost(self, pool: PoolKey) -> StepCost:
        """As learnt, with noise in what follows from it."""
        learnt = super().cost(pool)
        return _NoisyCost(
            base_s=learnt.base_s,
            token_s=learnt.token_s,
            pair_s=learnt.pair_s,
            request_s=learnt.request_s,
            kv_token_s=learnt.kv_token_s,
            noise=self._noise,
        )

    def _noise(self) -> float:
        return exp(self._rng.gauss(0.0, self._sigma))


class _TruePools(PoolTimes):
    """The profile in the predictor's terms, which has one base for each role."""

    def __init__(self, profile: EngineProfile) -> None:
        super().__init__()
        self._costs = {
            role: StepCost(
                base_s=base_s,
                token_s=profile.prefill_token_s,
                pair_s=profile.prefill_pair_s,
                request_s=profile.decode_request_s,
                kv_token_s=profile.decode_kv_token_s,
            )
            for role, base_s in ((Role.PREFILL, profile.prefill_base_s), (Role.DECODE, profile.decode_base_s))
        }

    def cost(self, pool: PoolKey) -> StepCost:
        """As it is."""
        return self._costs[Role(pool.role)]

    def biases(self, pool: PoolKey) -> Callable[[str], float]:
        """None is slower than another, as far as it knows."""
        return lambda replica_id: 1.0
