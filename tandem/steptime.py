"""How long one pool's engine steps take: a shape that its replicas share, and how much slower or faster each one is.

Must not know requests or networks. A pool is what has one model, one hardware and one role; `now_s` comes with the samples.
"""

import math
from dataclasses import dataclass, field

from tandem.errors import ConfigError
from tandem.histogram import LogHistogram, geometric_edges
from tandem.rolling import RollingMean
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample
from tandem.step_shape import StepShape

# Measured on 2 CPU cores with the bundled model (reference/vllm.md): 69 ms for 1000 tokens, about 2 ms a decode step.
# Only the first requests see these; a GPU's values are reached within some tens of samples.
FIRST_COST = StepCost(base_s=2e-3, token_s=6e-5, pair_s=1e-9, request_s=2e-4, kv_token_s=1e-8)
_RATIO_EDGES = geometric_edges(0.25, 4.0, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeConfig:
    """Memory and thresholds of one pool's step times."""

    warm_samples: int = 32  # before these no bias is learnt and the model is not ready: the shape comes first
    bias_weight: float = 0.05  # of one sample: about the last 20, a second or two of a working replica
    bias_memory_s: float = 10.0  # a sample after a part of this counts for as much of it: one that works seldom is known as soon ...
    max_bias_weight: float = 0.15  # ... as a few samples allow
    min_bias: float = 0.5  # beyond this and max_bias it is the shape's turn
    max_bias: float = 2.0
    drift_fraction: float = 0.25  # log ratio of all replicas at which what is remembered is scaled: well above noise of 3 to 10 %
    straggler_ratio: float = 1.3  # of the pool's median (algorithms.md, 3b)
    straggler_clear_ratio: float = 1.15
    straggler_after_s: float = 15.0  # a step in speed is seen after some 10 s: named within 30 s, which is what algorithms.md, 3b asks for
    forgive_after_s: float = 60.0  # without a sample: a bias is then let go, else a replica that gets no work for it would keep it
    review_s: float = 1.0  # how often stragglers are looked for
    fade_half_life_s: float = 900.0  # of what no recent step confirms
    error_window: int = 200
    max_replicas: int = 4096

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        if not 0.0 < self.min_bias < 1.0 < self.max_bias:
            raise ConfigError(f"the bias must be bounded below and above 1, got {self.min_bias} and {self.max_bias}")
        if not 1.0 < self.straggler_clear_ratio <= self.straggler_ratio <= self.max_bias:
            raise ConfigError("straggler_clear_ratio must be above 1, straggler_ratio no lower than it and no higher than max_bias")
        for name in (
            "warm_samples",
            "bias_weight",
            "bias_memory_s",
            "max_bias_weight",
            "drift_fraction",
            "review_s",
            "forgive_after_s",
            "fade_half_life_s",
            "error_window",
            "max_replicas",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A replica that has been slower than its pool for long enough to be named."""

    replica_id: str
    since_s: float  # when it was first seen slower
    slowdown: float  # its bias relative to the pool's median


@dataclass(slots=True)
class _Replica:
    bias: float = 1.0
    samples: int = 0
    seen_s: float = 0.0
    slow_since_s: float | None = None
    is_straggler: bool = False
    slowdown: float = 1.0


@dataclass(slots=True)
class _Review:
    next_s: float = -math.inf
    faded_s: float | None = None
    stragglers: tuple[Straggler, ...] = field(default=())


class StepTime:
    """seconds = bias of the replica * shape of the pool (sample). One observation takes about 12 us.

    Drift: where all replicas together leave the shape by `drift_fraction`, all that is remembered is scaled by what was seen, so that
    loads not seen since then are right as well. The bias is divided by the same, so that no prediction jumps.
    """

    def __init__(self, prior: StepCost = FIRST_COST, config: StepTimeConfig | None = None) -> None:
        self._config = config or StepTimeConfig()
        self._shape = StepShape(prior)
        self._replicas: dict[str, _Replica] = {}
        self._observations = 0
        self._drift = 0.0
        self._ratios = LogHistogram(_RATIO_EDGES)
        self._errors = RollingMean(self._config.error_window)
        self._review = _Review()

    @property
    def cost(self) -> StepCost:
        """What a step costs on a typical replica of the pool."""
        return self._shape.cost

    @property
    def observations(self) -> int:
        """Samples learnt from."""
        return self._observations

    @property
    def has_prefill(self) -> bool:
        """Whether enough steps with prefill were seen to know what it costs."""
        return self._shape.prefills >= self._config.warm_samples // 2

    @property
    def has_decode(self) -> bool:
        """Whether enough steps with decode were seen to know what it costs."""
        return self._shape.decodes >= self._config.warm_samples // 2

    @property
    def has_all(self) -> bool:
        """Whether enough of both was seen."""
        least, shape = self._config.warm_samples // 2, self._shape
        return shape.prefills >= least and shape.decodes >= least

    @property
    def is_ready(self) -> bool:
        """Whether it has seen enough to be used."""
        return self._observations >= self._config.warm_samples

    @property
    def error(self) -> float:
        """mean(|predicted - actual| / actual) over the last `error_window` samples, each predicted before it was learnt from."""
        return self._errors.mean

    @property
    def p90_ratio(self) -> float:
        """What a step's predicted seconds are multiplied with to be exceeded by one in ten; O(buckets)."""
        return self._ratios.quantile(0.9) if self._ratios.weight else 1.0

    @property
    def stragglers(self) -> tuple[Straggler, ...]:
        """Named replicas, by id, as of the last review."""
        return self._review.stragglers

    def bias(self, replica_id: str) -> float:
        """How much slower the replica is than the shape says; 1 where nothing is known of it."""
        replica = self._replicas.get(replica_id)
        return 1.0 if replica is None else replica.bias

    def observe(self, replica_id: str, sample: StepSample, now_s: float) -> None:
        """Learns from one step of one replica."""
        config = self._config
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = self._open(replica_id)
        shape_s = self._shape.cost.step_s(sample.prefill_tokens, sample.prefill_pairs, sample.decode_requests, sample.kv_tokens)
        actual_s = max(sample.duration_s, 1e-5)
        ratio = min(max(actual_s / max(shape_s, 1e-9), 0.1), 10.0)
        self._observations += 1
        unseen_s, replica.seen_s = now_s - replica.seen_s, now_s
        if self._observations > config.warm_samples:
            self._errors.add(abs(replica.bias * shape_s - actual_s) / actual_s)
            self._ratios.observe(ratio / replica.bias)
            weight = max(config.bias_weight, 1.0 / (replica.samples + 8), min(config.max_bias_weight, unseen_s / config.bias_memory_s))
            replica.bias = min(max(replica.bias + weight * (ratio - replica.bias), config.min_bias), config.max_bias)
            replica.samples += 1
            self._drift += config.bias_weight * (math.log(ratio) - self._drift)
        self._shape.observe(sample)
        if abs(self._drift) > config.drift_fraction:
            self._follow_drift()
        if now_s >= self._review.next_s:
            self._look_around(now_s)

    def forget(self, replica_id: str) -> None:
        """The replica is gone; one that comes back under the same id starts without a bias."""
        self._replicas.pop(replica_id, None)
        self._review.stragglers = tuple(straggler for straggler in self._review.stragglers if straggler.replica_id != replica_id)

    def _open(self, replica_id: str) -> _Replica:
        if len(self._replicas) >= self._config.max_replicas:
            self.forget(next(iter(self._replicas)))
        replica = self._replicas[replica_id] = _Replica()
        return replica

    def _follow_drift(self) -> None:
        factor = math.exp(self._drift)
        self._shape.rescale(factor)
        for replica in self._replicas.values():
            replica.bias = min(max(replica.bias / factor, self._config.min_bias), self._config.max_bias)
        self._drift = 0.0

    def _look_around(self, now_s: float) -> None:
        """Once a second: O(replicas log replicas)."""
        config, review = self._config, self._review
        review.next_s = now_s + config.review_s
        if review.faded_s is None or now_s - review.faded_s > config.fade_half_life_s / 8:
            if review.faded_s is not None:
                self._shape.fade(0.5 ** ((now_s - review.faded_s) / config.fade_half_life_s))
            review.faded_s = now_s
        for replica in self._replicas.values():
            if now_s - replica.seen_s > config.forgive_after_s:
                replica.bias += config.bias_weight * (1.0 - replica.bias)
        known = sorted(replica.bias for replica in self._replicas.values() if replica.samples >= config.warm_samples)
        if not known:
            return
        median = known[(len(known) - 1) // 2]  # the lower one: of two replicas the slow one differs
        named = []
        for replica_id, replica in sorted(self._replicas.items()):
            if replica.samples < config.warm_samples:
                continue
            replica.slowdown = replica.bias / median
            is_slow, was_slow = replica.slowdown > config.straggler_ratio, replica.slow_since_s is not None
            if replica.slowdown <= config.straggler_clear_ratio or not (is_slow or was_slow):
                replica.slow_since_s, replica.is_straggler = None, False
                continue
            replica.slow_since_s = now_s if replica.slow_since_s is None else replica.slow_since_s
            replica.is_straggler = replica.is_straggler or (is_slow and now_s - replica.slow_since_s >= config.straggler_after_s)
            if replica.is_straggler:
                named.append(Straggler(replica_id=replica_id, since_s=replica.slow_since_s, slowdown=replica.slowdown))
        review.stragglers = tuple(named)
