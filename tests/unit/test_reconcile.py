"""Pools converge to the plan: what is started, who is drained, what failed, and what is never stopped."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from autoscaler.observation import Observation, PoolKey, ReplicaObservation
from autoscaler.plan import DecisionReason, PoolDecision
from autoscaler.pool import PoolReplica, ReplicaNames
from autoscaler.reconcile import Reconciler
from tandem.cluster_config import ModelConfig
from tandem.domain import ModelId, ReplicaId, ReplicaState, Role
from tandem.errors import Reason, UnavailableError
from tandem.supervisor import SupervisedState
from tandem.v1 import worker_pb2
from tests.fake_channel import fake_channel
from tests.scaler_talk import replica

POOL = PoolKey(model=ModelId("m"), role=Role.DECODE)
RUNNING, FAILED, STOPPED = SupervisedState.RUNNING, SupervisedState.FAILED, SupervisedState.STOPPED


class FakePool:
    """A `ReplicaPool` where what is asked for runs at once. `refuses_after`: starts that succeed before one is refused."""

    def __init__(self, *names: str) -> None:
        self._replicas = {ReplicaId(name): self._made(ReplicaId(name), POOL) for name in names}
        self.refuses_after: int | None = None
        self.refused = 0
        self.orphans: set[ReplicaId] = set()

    @property
    def replicas(self) -> Mapping[ReplicaId, PoolReplica]:
        return self._replicas

    async def refresh(self) -> None:
        pass

    async def add(self, key: PoolKey, replica_id: ReplicaId) -> None:
        if self.refuses_after == 0:
            self.refused += 1
            raise UnavailableError("no room", reason=Reason.START_FAILED)
        self.refuses_after = None if self.refuses_after is None else self.refuses_after - 1
        assert replica_id not in self._replicas
        self._replicas[replica_id] = self._made(replica_id, key)

    async def remove(self, replica_id: ReplicaId) -> None:
        del self._replicas[replica_id]

    def set(self, name: str, state: SupervisedState, error: str = "") -> None:
        """The replica has changed; it serves no more."""
        self._replicas[ReplicaId(name)] = PoolReplica(replica_id=ReplicaId(name), key=POOL, state=state, error=error)

    @property
    def names(self) -> list[str]:
        return sorted(self._replicas)

    @staticmethod
    def _made(replica_id: ReplicaId, key: PoolKey) -> PoolReplica:
        return PoolReplica(replica_id=replica_id, key=key, state=RUNNING, address="a:1")


class Bench:
    """A reconciler at work on one pool. `running`: what each Drain call in turn answers; the last one goes on."""

    def __init__(self, pool: FakePool, group: asyncio.TaskGroup, drain_s: float = 60.0) -> None:
        self.pool = pool
        self._drain_s = drain_s
        self.failed: list[PoolKey] = []
        self.running: list[int | UnavailableError] = [0]
        self.drain_calls = 0
        self.reconciler = Reconciler(
            pool,
            ReplicaNames([ModelConfig(name="m")]),
            self._channel,
            group,
            on_start_failed=self.failed.append,
            drain_s=drain_s,
            drain_poll_s=0.0,
        )

    async def converge(self, wanted: int, observed: Sequence[ReplicaObservation], reason: DecisionReason = DecisionReason.SURPLUS) -> None:
        decision = PoolDecision(
            model=POOL.model, role=POOL.role, replicas=wanted, current=len(observed), reason=reason, detail="", is_changed=False
        )
        await self.reconciler.converge((decision,), Observation(replicas={POOL: tuple(observed)}))

    async def drained(self) -> None:
        """Until nobody is on its way out."""
        while self.reconciler.leaving:  # noqa: ASYNC110 - its tasks run in between
            await asyncio.sleep(0)

    def _channel(self, address: str) -> grpc.aio.Channel:
        async def drain(payload: bytes) -> worker_pb2.DrainResponse:
            assert worker_pb2.DrainRequest.FromString(payload).deadline_remaining_s == self._drain_s
            self.drain_calls += 1
            answer = self.running.pop(0) if len(self.running) > 1 else self.running[0]
            if isinstance(answer, UnavailableError):
                raise answer
            return worker_pb2.DrainResponse(running_requests=answer)

        return fake_channel({"tandem.v1.Worker/Drain": drain})


@asynccontextmanager
async def bench(*names: str, drain_s: float = 60.0) -> AsyncIterator[Bench]:
    """A bench on a pool with these replicas; drains that still go on at the end are awaited."""
    async with asyncio.TaskGroup() as group:
        yield Bench(FakePool(*names), group, drain_s)


def seen(*names: str, state: ReplicaState = ReplicaState.READY) -> list[ReplicaObservation]:
    return [replica(name, state) for name in names]


async def test_what_is_missing_is_started_under_the_lowest_free_numbers() -> None:
    async with bench("m-decode-1") as made:
        await made.converge(3, seen("m-decode-1"))
        assert made.pool.names == ["m-decode-0", "m-decode-1", "m-decode-2"]
        assert made.failed == []


async def test_replicas_that_lost_their_supervisor_are_asked_for_before_new_ones() -> None:
    async with bench("m-decode-1") as made:
        made.pool.orphans = {ReplicaId("m-decode-1"), ReplicaId("m-decode-4"), ReplicaId("m-prefill-3"), ReplicaId("other-decode-0")}
        await made.converge(3, seen("m-decode-1"))
        assert made.pool.names == ["m-decode-0", "m-decode-1", "m-decode-4"]


async def test_where_all_is_as_wanted_nothing_happens() -> None:
    async with bench("m-decode-0") as made:
        await made.converge(1, seen("m-decode-0"))
        assert made.pool.names == ["m-decode-0"]
        assert not made.reconciler.leaving


async def test_a_refused_start_counts_once_and_ends_the_attempts_of_this_step() -> None:
    async with bench() as made:
        made.pool.refuses_after = 1
        await made.converge(4, [])
        assert made.pool.names == ["m-decode-0"]
        assert made.pool.refused == 1
        assert made.failed == [POOL]


async def test_what_is_too_many_is_drained_and_then_removed() -> None:
    async with bench("m-decode-0", "m-decode-1") as made:
        made.running = [2, 1, 0]
        await made.converge(1, seen("m-decode-0", "m-decode-1"))
        assert made.reconciler.leaving == {"m-decode-1"}
        assert made.pool.names == ["m-decode-0", "m-decode-1"]
        await made.drained()
        assert made.pool.names == ["m-decode-0"]
        assert made.drain_calls == 3


async def test_a_replica_on_its_way_out_is_not_drained_twice_and_its_name_is_not_used() -> None:
    async with bench("m-decode-0", "m-decode-1") as made:
        made.running = [1]
        await made.converge(1, seen("m-decode-0", "m-decode-1"))
        leaving = [*seen("m-decode-0"), *seen("m-decode-1", state=ReplicaState.DRAINING)]
        await made.converge(1, leaving)
        assert made.reconciler.leaving == {"m-decode-1"}
        await made.converge(2, leaving)
        assert made.pool.names == ["m-decode-0", "m-decode-1", "m-decode-2"]
        made.running = [0]
        await made.drained()
        assert made.pool.names == ["m-decode-0", "m-decode-2"]


async def test_a_replica_that_an_operator_drains_is_replaced_and_then_removed() -> None:
    async with bench("m-decode-0") as made:
        await made.converge(1, seen("m-decode-0", state=ReplicaState.DRAINING), DecisionReason.STEADY)
        await made.drained()
        assert made.pool.names == ["m-decode-1"]


@pytest.mark.parametrize("reason", [DecisionReason.HOLD, DecisionReason.WAKE, DecisionReason.BACKOFF, DecisionReason.RETRY])
async def test_a_decision_that_may_not_stop_replicas_stops_none(reason: DecisionReason) -> None:
    async with bench("m-decode-0", "m-decode-1") as made:
        await made.converge(0, seen("m-decode-0", "m-decode-1"), reason)
        assert not made.reconciler.leaving
        await made.converge(3, seen("m-decode-0", "m-decode-1"), reason)
        assert len(made.pool.names) == 3


async def test_a_replica_that_has_no_process_yet_is_removed_at_once() -> None:
    async with bench("m-decode-0") as made:
        made.pool.set("m-decode-0", SupervisedState.STARTING)
        await made.converge(0, seen("m-decode-0", state=ReplicaState.STARTING))
        await made.drained()
        assert made.pool.names == []
        assert made.drain_calls == 0


async def test_a_drain_that_takes_too_long_is_cut_short() -> None:
    async with bench("m-decode-0", drain_s=0.0) as made:
        made.running = [1]
        await made.converge(0, seen("m-decode-0"))
        await made.drained()
        assert made.pool.names == []


async def test_a_replica_that_does_not_hear_its_drain_is_removed() -> None:
    async with bench("m-decode-0") as made:
        made.running = [UnavailableError("gone", reason=Reason.WORKER_LOST)]
        await made.converge(0, seen("m-decode-0"))
        await made.drained()
        assert made.pool.names == []


async def test_a_replica_that_the_pool_has_lost_meanwhile_is_passed_over() -> None:
    async with bench() as made:
        await made.converge(0, seen("m-decode-0"))
        assert not made.reconciler.leaving


async def test_what_failed_is_cleared_away_and_counts_as_a_failed_start() -> None:
    async with bench("m-decode-0", "m-decode-1") as made:
        made.pool.set("m-decode-1", FAILED)
        await made.reconciler.clear()
        assert made.pool.names == ["m-decode-0"]
        assert made.failed == [POOL]


async def test_a_replica_without_a_supervisor_is_cleared_away_and_is_no_failed_start() -> None:
    async with bench("m-decode-0") as made:
        made.pool.set("m-decode-0", STOPPED)
        await made.reconciler.clear()
        assert (made.pool.names, made.failed) == ([], [])


async def test_what_ends_while_it_leaves_is_left_to_its_drain() -> None:
    async with bench("m-decode-0") as made:
        made.running = [1]
        await made.converge(0, seen("m-decode-0"))
        made.pool.set("m-decode-0", FAILED)
        await made.reconciler.clear()
        assert (made.pool.names, made.failed) == (["m-decode-0"], [])
        made.running = [0]
        await made.drained()
        assert made.pool.names == []


@pytest.mark.parametrize("names", [("m-decode-0", "m-decode-1"), ("m-decode-1", "m-decode-0")])
async def test_why_replicas_do_not_start_is_told_until_one_runs_whatever_their_order(names: tuple[str, str]) -> None:
    async with bench(*names) as made:
        for name in names:
            made.pool.set(name, FAILED, "no such model")
        await made.reconciler.clear()
        assert made.reconciler.errors == {POOL.model: "no such model"}
        await made.converge(1, [])
        await made.reconciler.clear()
        assert made.reconciler.errors == {}


async def test_one_start_that_fails_may_be_an_accident() -> None:
    async with bench("m-decode-0") as made:
        made.pool.set("m-decode-0", FAILED, "killed")
        await made.reconciler.clear()
        assert made.reconciler.errors == {}


async def test_why_starts_were_refused_is_told() -> None:
    async with bench() as made:
        made.pool.refuses_after = 0
        await made.converge(1, [])
        await made.converge(1, [])
        assert made.reconciler.errors == {POOL.model: "no room"}
