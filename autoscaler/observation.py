"""What one scaling decision is made from: replicas, demand, targets set by hand. Plain values, all immutable.

Must not gather anything: the autoscaler's shell does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.domain import ModelId, ReplicaId, ReplicaState, ReplicaTarget, Role


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PoolKey:
    """A pool: the replicas of one model in one role. Ordered by model, then role."""

    model: ModelId
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaObservation:
    """One replica, all its traffic counted."""

    replica_id: ReplicaId
    state: ReplicaState
    load_fraction: float = 0.0  # 0..1, the larger of running requests / max_num_seqs and KV used
    running_requests: int = 0
    backlog_s: float = 0.0  # predicted seconds of prefill work ahead, as the routers see it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemand:
    """What waits for a model in all routers together, held requests included."""

    model: ModelId
    queued_requests: int = 0
    queued_work_s: float = 0.0  # predicted seconds of prefill work; 0 where nothing is known
    recent_requests: int = 0  # requests served since the last observation: those too short to be seen running

    @property
    def is_waiting(self) -> bool:
        """Whether anything needs a replica now."""
        return self.queued_requests > 0 or self.queued_work_s > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The cluster at one moment. What is missing in it is not known to be zero unless `is_complete`."""

    replicas: Mapping[PoolKey, tuple[ReplicaObservation, ...]] = field(default_factory=dict)
    demands: tuple[ModelDemand, ...] = ()
    manual_targets: tuple[ReplicaTarget, ...] = ()  # expires_in_s: time left now, 0 where the target stays
    is_complete: bool = True  # False: a router or the register did not answer

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits, starts or drains, and nothing has been asked since the last observation."""
        is_still = all(item.state is ReplicaState.READY and not item.running_requests for pool in self.replicas.values() for item in pool)
        return self.is_complete and is_still and not any(demand.is_waiting or demand.recent_requests for demand in self.demands)
