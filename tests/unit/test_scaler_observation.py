"""When a cluster is idle as the autoscaler sees it."""

import pytest

from autoscaler.observation import ModelDemand, Observation, PoolKey, ReplicaObservation
from tandem.domain import ModelId, ReplicaId, ReplicaState, Role

KEY = PoolKey(model=ModelId("m"), role=Role.DECODE)


def observation(state: ReplicaState = ReplicaState.READY, running: int = 0, is_complete: bool = True, **demand: float) -> Observation:
    replica = ReplicaObservation(replica_id=ReplicaId("r"), state=state, running_requests=running)
    demands = (ModelDemand(model=KEY.model, **demand),)  # type: ignore[arg-type]
    return Observation(replicas={KEY: (replica,)}, demands=demands, is_complete=is_complete)


def test_a_cluster_where_nothing_happens_is_idle() -> None:
    assert observation().is_idle
    assert Observation().is_idle


@pytest.mark.parametrize(
    "busy",
    [
        observation(ReplicaState.STARTING),
        observation(ReplicaState.DRAINING),
        observation(running=1),
        observation(queued_requests=1),
        observation(queued_work_s=0.1),
        observation(recent_requests=1),
        observation(is_complete=False),
    ],
)
def test_anything_that_moves_or_is_unknown_keeps_it_awake(busy: Observation) -> None:
    assert not busy.is_idle
