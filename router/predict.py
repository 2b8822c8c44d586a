"""What a request will cost in seconds, each term with its upper quantile: step times per pool, fixed costs, and the wait in the queue.

Must not choose or keep requests: token counts in, seconds out. Learns from engine steps of every replica, and from outcomes of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from router.drain_rate import DrainRate
from router.interval import Calibration, Interval, PredictionKind
from router.line_rate import LineRate
from router.output_length import OutputEstimate
from router.pool_times import PoolKey, PoolTimes, PoolTimesConfig
from router.scores import Scores
from tandem.domain import Role
from tandem.errors import ConfigError
from tandem.least_squares import LeastSquares
from tandem.lru import Lru
from tandem.rolling import RollingQuantile
from tandem.step_cost import StepCost, attention_pairs

_GAP_PRIOR = (5e-3, 1e-4)  # seconds, and seconds per block, of a hand-off
_GAP_PRIOR_OTHER_NODE = (1e-2, 5e-4)
_TRANSFER_PRIOR = (1e-3, 1e-9)  # seconds, and seconds per byte: 1 GB/s
_TRANSFER_PRIOR_OTHER_NODE = (2e-3, 4e-9)
_QUEUE_FLOOR_S = 1e-2
_OVERHEAD_OUTCOMES = 64  # of whose differences the median is a fixed cost
_LEAST_OVERHEADS = 8


class EngineWork(NamedTuple):
    """What one replica has to do. Pairs: sum over its pending prompts of u * c + u^2 / 2."""

    chunk_tokens: int  # its max_num_batched_tokens
    pending_tokens: int = 0
    pending_pairs: float = 0.0
    decode_requests: int = 0
    kv_tokens: int = 0
    step_elapsed_s: float | None = None  # of the step that runs; None: not known, half of it is assumed


class PoolRates(NamedTuple):
    """What the work of one pool costs: coefficients of a typical replica, whose own bias multiplies them, and a worker's fixed costs."""

    cost: StepCost
    bias: Callable[[str], float]  # of a replica
    prefill_fixed_s: float
    tpot_fixed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Bounds of one router's predictions."""

    max_models: int = 256
    pools: PoolTimesConfig = field(default_factory=PoolTimesConfig)

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        if self.max_models < 1:
            raise ConfigError(f"max_models must be at least 1, got {self.max_models}")
        self.pools.validate()


class LoadPredictor:
    """What one router predicts with: `pools` holds the step times (feed it), `scores` says what predictions were worth (read it).

    The `*_s` methods are for comparing candidates: plain floats, 1 to 3 us. The others make an `Interval` for the one that was chosen.
    """

    def __init__(self, config: PredictConfig | None = None, scores: Scores | None = None) -> None:
        self._config = config = config or PredictConfig()
        self.pools = PoolTimes(config.pools)
        self.scores = scores or Scores()
        kinds = config.max_models * len(PredictionKind)
        self._calibrations: Lru[tuple[PredictionKind, str], Calibration] = Lru(kinds, Calibration)
        self._queue_calibrations: Lru[str, Calibration] = Lru(config.max_models, lambda: Calibration(floor=_QUEUE_FLOOR_S))
        self._overheads: Lru[tuple[PredictionKind, str], _FixedCost] = Lru(kinds, _FixedCost)
        self._drains: Lru[str, DrainRate] = Lru(config.max_models, DrainRate)
        self._line_rates: Lru[PoolKey, LineRate] = Lru(config.max_models * len(Role), LineRate)
        self._gaps = _fits(config, _GAP_PRIOR, _GAP_PRIOR_OTHER_NODE)
        self._transfers = _fits(config, _TRANSFER_PRIOR, _TRANSFER_PRIOR_OTHER_NODE)

    # Candidates: seconds without quantiles.

    def rates(self, pool: PoolKey) -> PoolRates:
        """What `prefill_s` and `tpot_s` are made of, for many replicas of a pool at one moment."""
        fixed_s = (self._overhead_s(kind, pool.model) for kind in (PredictionKind.PREFILL, PredictionKind.TPOT))
        return PoolRates(self.pools.cost(pool), self.pools.biases(pool), *fixed_s)

    def backlog_s(self, pool: PoolKey, replica_id: str, work: EngineWork) -> float:
        """Seconds of the replica's own work before a prompt that comes now is begun."""
        chunk, tokens, pairs, requests, kv_tokens, elapsed_s = work
        engine_s = self.pools.cost(pool).finish_s(0, 0, chunk, tokens, pairs, requests, kv_tokens, elapsed_s)
        return self.pools.bias(pool, replica_id) * engine_s

    def prefill_s(self, pool: PoolKey, replica_id: str, work: EngineWork, *, uncached_tokens: int, cached_tokens: int) -> float:
        """Seconds from acceptance to first token on the replica, behind its work, the worker's fixed cost included."""
        chunk, tokens, pairs, requests, kv_tokens, elapsed_s = work
        own_pairs = attention_pairs(uncached_tokens, cached_tokens)
        engine_s = self.pools.cost(pool).finish_s(uncached_tokens, own_pairs, chunk, tokens, pairs, requests, kv_tokens, elapsed_s)
        return self.pools.bias(pool, replica_id) * engine_s + self._overhead_s(PredictionKind.PREFILL, pool.model)

    def tpot_s(self, pool: PoolKey, replica_id: str, work: EngineWork, *, output_tokens: float) -> float:
        """Seconds per output token of the batch `work` describes, the new request included, with its pending prompts in between."""
        chunk, tokens, pairs, requests, kv_tokens, _ = work
        step_s = self.pools.cost(pool).tpot_s(
            requests, kv_tokens, output_tokens=output_tokens, pending_tokens=tokens, pending_pairs=pairs, chunk_tokens=chunk
        )
        return self.pools.bias(pool, replica_id) * step_s + self._overhead_s(PredictionKind.TPOT, pool.model)

    def handoff_gap_s(self, model: str, *, blocks: int, is_same_node: bool) -> float:
        """Seconds between token 1 and token 2 of a request that is handed off with so many blocks."""
        return self._gaps[is_same_node].obtain(model).predict((1.0, float(blocks)))

    def transfer_s(self, model: str, *, size_bytes: int, is_same_node: bool) -> float:
        """Seconds to bring so many bytes of KV to a replica."""
        return self._transfers[is_same_node].obtain(model).predict((1.0, float(size_bytes)))

    def queue_s(self, model: str, *, ahead_s: float, replicas: int, now_s: float) -> float:
        """Seconds until so much predicted work has left this router's queue of the model. `replicas`: that take it."""
        return self._drains.obtain(model).wait_s(max(0.0, ahead_s), now_s, float(max(1, replicas)))

    def line_s(self, pool: PoolKey, *, ahead_s: float, now_s: float) -> float:
        """Seconds until so much predicted work in one worker's line has been given to it."""
        return self._line_rates.obtain(pool).wait_s(ahead_s, now_s)

    # The chosen: intervals.

    def prefill(self, pool: PoolKey, replica_id: str, work: EngineWork, *, uncached_tokens: int, cached_tokens: int) -> Interval:
        """`prefill_s` with its quantile. Only prompts that hardly wait teach the fixed cost."""
        mean_s = self.prefill_s(pool, replica_id, work, uncached_tokens=uncached_tokens, cached_tokens=cached_tokens)
        base_s = mean_s - self._overhead_s(PredictionKind.PREFILL, pool.model)
        is_telling = 2.0 * self.backlog_s(pool, replica_id, work) <= base_s
        return self._interval(PredictionKind.PREFILL, pool.model, mean_s, base_s if is_telling else None)

    def prefill_behind(self, pool: PoolKey, *, backlog_s: float, own_s: float) -> Interval:
        """`prefill` where the seconds are known: so many behind others, and `prefill_s` of its own with no work in front.

        The fixed cost passes while the worker does what is in front.
        """
        fixed_s = self._overhead_s(PredictionKind.PREFILL, pool.model)
        engine_s = own_s - fixed_s
        is_telling = 2.0 * backlog_s <= own_s
        base_s = backlog_s + engine_s if is_telling else None
        return self._interval(PredictionKind.PREFILL, pool.model, max(backlog_s, fixed_s) + engine_s, base_s)

    def tpot(self, pool: PoolKey, replica_id: str, work: EngineWork, *, output_tokens: float) -> Interval:
        """`tpot_s` with its quantile."""
        mean_s = self.tpot_s(pool, replica_id, work, output_tokens=output_tokens)
        return self._interval(PredictionKind.TPOT, pool.model, mean_s, mean_s - self._overhead_s(PredictionKind.TPOT, pool.model))

    def handoff_gap(self, model: str, *, blocks: int, is_same_node: bool) -> Interval:
        """`handoff_gap_s` with its quantile."""
        return self._interval(PredictionKind.HANDOFF_GAP, model, self.handoff_gap_s(model, blocks=blocks, is_same_node=is_same_node))

    def transfer(self, model: str, *, size_bytes: int, is_same_node: bool) -> Interval:
        """`transfer_s` with its quantile."""
        return self._interval(PredictionKind.TRANSFER, model, self.transfer_s(model, size_bytes=size_bytes, is_same_node=is_same_node))

    def queue(self, model: str, mean_s: float) -> Interval:
        """`queue_s` or `line_s` with its quantile."""
        return Interval(mean_s, self._queue_calibrations.obtain(model).upper(mean_s))

    def ttft(self, model: str, *, queue: Interval, prefill: Interval) -> Interval:
        """Queue, dispatch and prefill: arrival to first token."""
        return self._interval(PredictionKind.TTFT, model, queue.mean_s + self._overhead_s(PredictionKind.TTFT, model) + prefill.mean_s)

    def e2e(self, model: str, *, ttft: Interval, tpot: Interval, output: OutputEstimate, handoff_gap: Interval | None = None) -> Interval:
        """Arrival to last token. A hand-off's gap is the time of its second token."""
        steps = max(0.0, output.mean_tokens - 1.0 - (handoff_gap is not None))
        gap_s = 0.0 if handoff_gap is None else handoff_gap.mean_s
        return self._interval(PredictionKind.E2E, model, ttft.mean_s + gap_s + steps * tpot.mean_s)

    # Outcomes.

    def observe(
        self, kind: PredictionKind, model: str, predicted: Interval, actual_s: float, now_s: float, *, is_guess: bool = False
    ) -> None:
        """What became of a prediction, used or not: learns its quantile and its fixed cost, and scores it. A guess is scored only."""
        self.scores.observe(kind, model, predicted=predicted.mean_s, q90=predicted.q90_s, actual=actual_s, now_s=now_s, is_guess=is_guess)
        if is_guess:
            return
        if kind is PredictionKind.QUEUE:
            self._queue_calibrations.obtain(model).observe(predicted.mean_s, actual_s)
        else:
            self._calibrations.obtain((kind, model)).observe(predicted.mean_s, actual_s)
        if predicted.base_s is not None:
            self._overheads.obtain((kind, model)).add(actual_s - predicted.base_s)

    def observe_output(self, model: str, predicted: OutputEstimate, actual_tokens: int, now_s: float) -> None:
        """Scores an output length; `OutputLengths` learns it."""
        self.scores.observe(
            PredictionKind.OUTPUT_TOKENS,
            model,
            predicted=predicted.mean_tokens,
            q90=predicted.p90_tokens,
            actual=float(actual_tokens),
            now_s=now_s,
        )

    def observe_dispatch(self, model: str, dispatch_s: float) -> None:
        """Learns the fixed cost between queue and worker: a receipt's dispatch_s."""
        self._overheads.obtain((PredictionKind.TTFT, model)).add(dispatch_s)

    def observe_handoff_gap(self, model: str, *, blocks: int, is_same_node: bool, gap_s: float) -> None:
        """Learns from one hand-off."""
        self._gaps[is_same_node].obtain(model).observe((1.0, float(blocks)), gap_s)

    def observe_transfer(self, model: str, *, size_bytes: int, is_same_node: bool, transfer_s: float) -> None:
        """Learns from one transfer."""
        self._transfers[is_same_node].obtain(model).observe((1.0, float(size_bytes)), transfer_s)

    def note_queue(self, model: str, *, is_waiting: bool, now_s: float) -> None:
        """After every change of the model's queue: whether anything waits."""
        self._drains.obtain(model).note(is_waiting=is_waiting, now_s=now_s)

    def dispatched(self, model: str, work_s: float, now_s: float, *, is_guess: bool = False) -> None:
        """A request with so many seconds of predicted prefill has left the queue; before `note_queue`."""
        self._drains.obtain(model).dispatched(work_s, now_s, is_guess=is_guess)

    def line_moved(self, pool: PoolKey, *, work_s: float, waited_s: float, now_s: float) -> None:
        """A worker did so much of its predicted work in so many seconds in which somebody waited for it."""
        self._line_rates.obtain(pool).moved(work_s, waited_s, now_s)

    # Inside.

    def _interval(self, kind: PredictionKind, model: str, mean_s: float, base_s: float | None = None) -> Interval:
        return Interval(mean_s, self._calibrations.obtain((kind, model)).upper(mean_s), base_s)

    def _overhead_s(self, kind: PredictionKind, model: str) -> float:
        """The fixed cost that was learnt; 0 while little was seen."""
        seen = self._overheads.get((kind, model))
        return 0.0 if seen is None else seen.fixed_s


class _FixedCost:
    """The median of the last differences: at least 0, and 0 while there are few. Asked more often than told."""

    __slots__ = ("_seen", "fixed_s")

    def __init__(self) -> None:
        self._seen = RollingQuantile(_OVERHEAD_OUTCOMES)
        self.fixed_s = 0.0

    def add(self, difference_s: float) -> None:
        self._seen.add(difference_s)
        if len(self._seen) >= _LEAST_OVERHEADS:
            self.fixed_s = max(0.0, self._seen.quantile(0.5))


def _fits(config: PredictConfig, same_node: Sequence[float], other_node: Sequence[float]) -> dict[bool, Lru[str, LeastSquares]]:
    """A fit per model, by whether both ends are on the same node."""
    return {is_same: Lru(config.max_models, partial(LeastSquares, prior)) for is_same, prior in ((True, same_node), (False, other_node))}
