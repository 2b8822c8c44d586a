"""What the autoscaler wants: a replica count per pool, with the reason, and who goes first.

Must not act: the autoscaler's shell converges the pools towards a plan.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from autoscaler.observation import PoolKey, ReplicaObservation
from tandem.domain import ModelId, ReplicaId, ReplicaState, Role


class DecisionReason(StrEnum):
    """Which rule decided. STEADY: none had anything to change."""

    MANUAL = "manual"  # set by hand
    HOLD = "hold"  # data is missing
    INITIAL = "initial"  # the first replicas of an empty pool
    ADOPTED = "adopted"  # the automatic rules go on from the replicas that are there
    WAKE = "wake"  # demand for a pool at zero
    MINIMUM = "minimum"
    MAXIMUM = "maximum"
    BACKLOG = "backlog"  # more prefill work ahead than may wait
    LOAD = "load"  # replicas too full
    QUEUE = "queue"  # requests wait in the routers and nothing tells why
    SURPLUS = "surplus"  # fewer replicas do
    IDLE = "idle"  # no request for long: to zero
    BACKOFF = "backoff"  # replicas fail to start: no more for a while
    RETRY = "retry"  # the back-off is over
    STEADY = "steady"


# With these the count is a floor: it may rest on data that is missing, or on replicas that could not be started.
_NEVER_STOPS = frozenset({DecisionReason.HOLD, DecisionReason.WAKE, DecisionReason.BACKOFF, DecisionReason.RETRY})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDecision:
    """The count wanted for one pool. `current` counts starting and ready replicas; `detail` is for people."""

    model: ModelId
    role: Role
    replicas: int
    current: int
    reason: DecisionReason
    detail: str
    is_changed: bool  # differs from the decision before; at first, from what is there

    @property
    def key(self) -> PoolKey:
        """The pool."""
        return PoolKey(model=self.model, role=self.role)

    @property
    def may_stop(self) -> bool:
        """Whether replicas beyond the count may be stopped. Where not, the count is a floor: start up to it, stop none."""
        return self.reason not in _NEVER_STOPS


Plan = tuple[PoolDecision, ...]  # one decision per configured pool, by model and role


def choose_victims(replicas: Iterable[ReplicaObservation], count: int) -> list[ReplicaId]:
    """The `count` replicas that are cheapest to lose, cheapest first; fewer where there are no more. O(n log n).

    Starting before ready, then the fewest running requests, the lowest load, the highest id. Draining ones are leaving already.
    """
    staying = [replica for replica in replicas if replica.state is not ReplicaState.DRAINING]
    staying.sort(key=lambda replica: replica.replica_id, reverse=True)
    staying.sort(key=lambda replica: (replica.state is not ReplicaState.STARTING, replica.running_requests, replica.load_fraction))
    return [replica.replica_id for replica in staying[: max(count, 0)]]
