"""Step times of every pool, and what one pool lacks taken from its siblings.

Must not know requests: engine steps in, coefficients out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.errors import ConfigError
from tandem.lru import Lru
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample
from tandem.steptime import FIRST_COST, StepTime, StepTimeConfig, Straggler

_REFILL_EACH = 64  # own samples, after which siblings are looked at again


class PoolKey(NamedTuple):
    """Whose step times are alike. `hardware` is any name for what the replicas run on."""

    model: str
    hardware: str
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTimesConfig:
    """Bounds of what is learnt from."""

    max_pools: int = 256
    max_samples_per_s: float = 2000.0  # at some 12 us each 2 % of a core; beyond, the older ones of a report are skipped
    step: StepTimeConfig = field(default_factory=StepTimeConfig)

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in ("max_pools", "max_samples_per_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.step.validate()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """What is known of one pool, for metrics and for the autoscaler."""

    pool: PoolKey
    cost: StepCost
    filled: StepCost  # the same with what its own steps do not tell taken from its siblings now
    error: float  # mean(|predicted - actual| / actual) of the last steps
    p90_ratio: float
    observations: int
    is_ready: bool
    stragglers: tuple[Straggler, ...]


@dataclass(slots=True)
class _Filled:
    own: StepCost
    cost: StepCost
    until_observations: int


class PoolTimes:
    """One `StepTime` per pool; at most `max_pools`, the one used longest ago goes first."""

    def __init__(self, config: PoolTimesConfig | None = None) -> None:
        self._config = config = config or PoolTimesConfig()
        self.skipped_samples_total = 0
        self._pools: Lru[PoolKey, StepTime] = Lru(config.max_pools, lambda: StepTime(FIRST_COST, config.step))
        self._filled: dict[PoolKey, _Filled] = {}  # of pools that have not seen enough of one kind of step
        self._budget_samples = config.max_samples_per_s
        self._budget_s = 0.0

    def observe(self, pool: PoolKey, replica_id: str, samples: Sequence[StepSample], now_s: float) -> None:
        """Learns from a replica's steps, oldest first; about 12 us each."""
        limit = self._config.max_samples_per_s
        self._budget_samples = min(limit, self._budget_samples + limit * max(0.0, now_s - self._budget_s))
        self._budget_s = max(self._budget_s, now_s)
        taken = min(len(samples), int(self._budget_samples))
        self._budget_samples -= taken
        self.skipped_samples_total += len(samples) - taken
        times = self._pools.obtain(pool)
        for sample in samples[len(samples) - taken :]:
            times.observe(replica_id, sample, now_s)

    def forget_replica(self, pool: PoolKey, replica_id: str) -> None:
        """The replica is gone, or has another role now."""
        times = self._pools.get(pool)
        if times is not None:
            times.forget(replica_id)

    def is_ready(self, pool: PoolKey) -> bool:
        """Whether the pool's step times are learnt; until then predictions are guesses, right in order at best."""
        times = self._pools.get(pool)
        return times is not None and times.is_ready

    def bias(self, pool: PoolKey, replica_id: str) -> float:
        """How much slower the replica is than its pool's shape; 1 where that is not known."""
        return self.biases(pool)(replica_id)

    def biases(self, pool: PoolKey) -> Callable[[str], float]:
        """`bias` of the pool's replicas, for many of them at one moment."""
        times = self._pools.get(pool)
        return _no_bias if times is None else times.bias

    def cost(self, pool: PoolKey) -> StepCost:
        """What a step costs on a typical replica of the pool.

        Prefill replicas hardly decode and decode replicas hardly prefill: what a pool has not seen enough of is taken from one of the
        same model and hardware that has, else from one of the same model. Below 1 us; O(pools) once in a while.
        """
        times = self._pools.get(pool)
        if times is None:
            return self._fill(pool, None)
        if times.has_all:
            return times.cost
        filled = self._filled.get(pool)
        if filled is None or filled.own is not times.cost or times.observations >= filled.until_observations:
            if len(self._filled) > self._config.max_pools:
                self._filled.clear()
            filled = _Filled(times.cost, self._fill(pool, times), times.observations + _REFILL_EACH)
            self._filled[pool] = filled
        return filled.cost

    def stragglers(self) -> tuple[Straggler, ...]:
        """Named replicas of every pool, by pool and id."""
        return tuple(one for _, times in sorted(self._pools.items(), key=lambda item: item[0]) for one in times.stragglers)

    def reports(self) -> tuple[PoolReport, ...]:
        """Every pool that has sent steps, by key. Changes nothing that decisions read, so that whoever looks is no part of a replay."""
        return tuple(
            PoolReport(
                pool=pool,
                cost=times.cost,
                filled=times.cost if times.has_all else self._fill(pool, times),
                error=times.error,
                p90_ratio=times.p90_ratio,
                observations=times.observations,
                is_ready=times.is_ready,
                stragglers=times.stragglers,
            )
            for pool, times in sorted(self._pools.items(), key=lambda item: item[0])
        )

    def _fill(self, pool: PoolKey, times: StepTime | None) -> StepCost:
        """Own coefficients, those of the best sibling where own steps do not tell."""
        siblings = [(key, other) for key, other in self._pools.items() if key.model == pool.model and key != pool and other.is_ready]
        siblings.sort(key=lambda item: (item[0].hardware != pool.hardware, item[0]))
        prefill = None if times is not None and times.has_prefill else next((other for _, other in siblings if other.has_prefill), None)
        decode = None if times is not None and times.has_decode else next((other for _, other in siblings if other.has_decode), None)
        own = FIRST_COST if times is None else times.cost
        is_own_ready = times is not None and times.is_ready
        base = own if is_own_ready else next((other.cost for other in (prefill, decode) if other is not None), own)
        by_prefill = own if prefill is None else prefill.cost
        by_decode = own if decode is None else decode.cost
        return StepCost(
            base_s=base.base_s,
            token_s=by_prefill.token_s,
            pair_s=by_prefill.pair_s,
            request_s=by_decode.request_s,
            kv_token_s=by_decode.kv_token_s,
        )


def _no_bias(replica_id: str) -> float:
    """Of pools of which nothing is known."""
    return 1.0
