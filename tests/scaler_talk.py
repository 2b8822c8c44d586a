"""A scaler core with a hand-moved clock, and short words for what it sees. Model "m", one prefill and one decode pool."""

from collections.abc import Sequence

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.core import ScalerCore
from autoscaler.observation import ModelDemand, Observation, PoolKey, ReplicaObservation
from autoscaler.plan import PoolDecision
from tandem.domain import ModelId, ReplicaId, ReplicaState, ReplicaTarget, Role

MODEL = ModelId("m")
PREFILL = PoolKey(model=MODEL, role=Role.PREFILL)
DECODE = PoolKey(model=MODEL, role=Role.DECODE)
TICK_S = 5.0
READY, STARTING, DRAINING = ReplicaState.READY, ReplicaState.STARTING, ReplicaState.DRAINING


def limits(role: Role, low: int = 1, high: int = 8, initial: int = 1) -> PoolLimits:
    """Bounds of one pool of model "m"."""
    return PoolLimits(model=MODEL, role=role, min_replicas=low, max_replicas=high, initial_replicas=initial)


def replica(name: str, state: ReplicaState = READY, *, load: float = 0.0, running: int = 0, backlog_s: float = 0.0) -> ReplicaObservation:
    """One replica."""
    return ReplicaObservation(replica_id=ReplicaId(name), state=state, load_fraction=load, running_requests=running, backlog_s=backlog_s)


def replicas(
    count: int, state: ReplicaState = READY, *, load: float = 0.0, running: int = 0, backlog_s: float = 0.0
) -> list[ReplicaObservation]:
    """Equal replicas; their ids say the state, so that those of two calls do not clash."""
    return [replica(f"{state}-{number}", state, load=load, running=running, backlog_s=backlog_s) for number in range(count)]


def by_hand(role: Role, count: int, expires_in_s: float = 0.0) -> ReplicaTarget:
    """A target set by hand."""
    return ReplicaTarget(model=MODEL, role=role, replicas=count, expires_in_s=expires_in_s)


class Scaler:
    """The core under test. `see` is one tick, `TICK_S` after the last."""

    def __init__(self, *pools: PoolLimits, config: ScalerConfig | None = None) -> None:
        chosen = pools or (limits(Role.PREFILL), limits(Role.DECODE))
        self.core = ScalerCore(chosen, config or ScalerConfig())
        self.now_s = 1000.0

    def see(
        self,
        prefill: Sequence[ReplicaObservation] = (),
        decode: Sequence[ReplicaObservation] = (),
        *,
        queued: int = 0,
        work_s: float = 0.0,
        recent: int = 0,
        manual: Sequence[ReplicaTarget] = (),
        is_complete: bool = True,
        after_s: float = TICK_S,
    ) -> dict[Role, PoolDecision]:
        """The decisions, by role."""
        self.now_s += after_s
        observation = Observation(
            replicas={PREFILL: tuple(prefill), DECODE: tuple(decode)},
            demands=(ModelDemand(model=MODEL, queued_requests=queued, queued_work_s=work_s, recent_requests=recent),),
            manual_targets=tuple(manual),
            is_complete=is_complete,
        )
        return {decision.role: decision for decision in self.core.tick(observation, self.now_s)}
