"""One observation from everybody's words: whose count, what is missing, what a lost register does."""

from collections.abc import Sequence

import grpc.aio
import pytest

from autoscaler.observation import ModelDemand, Observation, PoolKey, ReplicaObservation
from autoscaler.observe import Observer, merge
from autoscaler.pool import PoolReplica
from tandem.cluster_view import ClusterStatus, ModelQueue, ReplicaStatus
from tandem.convert import lease_to_pb, load_to_pb
from tandem.domain import Lease, ModelId, ReplicaId, ReplicaState, ReplicaTarget, Role, WorkerLoad
from tandem.errors import Reason, UnavailableError
from tandem.membership import REFILL_S, MemberKind
from tandem.supervisor import SupervisedState
from tandem.v1 import control_pb2
from tests.fake_channel import fake_channel
from tests.memory_register import MemoryRegister
from tests.register_bench import DECODE as DECODE_TARGET
from tests.register_bench import PREFILL as PREFILL_TARGET
from tests.register_bench import member
from tests.samples import ENGINE, make_lease

M = ModelId("m")
POOL = PoolKey(model=M, role=Role.DECODE)
STARTING, READY, DRAINING = ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING


def pool_replica(state: SupervisedState = SupervisedState.RUNNING, name: str = "decode-0", incarnation: int = 1) -> PoolReplica:
    return PoolReplica(replica_id=ReplicaId(name), key=POOL, state=state, incarnation=incarnation, address=f"{name}:1")


def view(lease: Lease, load: WorkerLoad | None = None, *, is_reachable: bool = True, work_s: float = 0.0) -> ReplicaStatus:
    return ReplicaStatus(lease=lease, load=load or WorkerLoad(), is_reachable=is_reachable, predicted_work_s=work_s)


def status(*views: ReplicaStatus) -> ClusterStatus:
    return ClusterStatus(cluster="c", router_id="r", queued_requests=0, running_requests=0, replicas=views, targets=())


def observed(replica: PoolReplica, *statuses: ClusterStatus, leaving: Sequence[ReplicaId] = ()) -> ReplicaObservation:
    """The one replica in the merged observation."""
    observation = merge([replica], leaving, statuses, (), {}, manual=(), is_complete=True)
    (found,) = observation.replicas[POOL]
    return found


def test_a_running_replica_that_a_router_sees_is_ready() -> None:
    assert observed(pool_replica(), status(view(make_lease()))).state is READY


@pytest.mark.parametrize(
    "seen",
    [
        status(),
        status(view(make_lease(incarnation=2))),
        status(view(make_lease(), is_reachable=False)),
        status(view(make_lease("decode-1"))),
    ],
    ids=["by nobody", "in another incarnation", "as unreachable", "under another name"],
)
def test_a_running_replica_that_is_not_seen_is_still_starting(seen: ClusterStatus) -> None:
    assert observed(pool_replica(), seen).state is STARTING


def test_where_no_router_answers_a_running_replica_counts_as_ready() -> None:
    assert observed(pool_replica()).state is READY


def test_a_replica_whose_process_is_starting_again_is_starting_whoever_saw_it() -> None:
    assert observed(pool_replica(SupervisedState.STARTING), status(view(make_lease()))).state is STARTING


def test_a_replica_drains_where_one_router_says_so_or_reconcile_does() -> None:
    draining = status(view(make_lease(state=DRAINING)))
    assert observed(pool_replica(), status(view(make_lease())), draining).state is DRAINING
    assert observed(pool_replica(), status(view(make_lease())), leaving=[ReplicaId("decode-0")]).state is DRAINING


def test_what_an_older_incarnation_said_of_draining_does_not_count() -> None:
    assert observed(pool_replica(incarnation=2), status(view(make_lease(state=DRAINING)))).state is STARTING


def test_failed_and_stopped_replicas_are_not_observed() -> None:
    replicas = [pool_replica(SupervisedState.FAILED), pool_replica(SupervisedState.STOPPED, "decode-1")]
    assert merge(replicas, (), (), (), {}, manual=(), is_complete=True).replicas == {}


def test_of_several_routers_reports_of_one_replica_the_largest_counts() -> None:
    low = view(make_lease(), WorkerLoad(running_requests=ENGINE.max_num_seqs // 2, kv_used_fraction=0.1), work_s=1.0)
    high = view(make_lease(), WorkerLoad(running_requests=1, kv_used_fraction=0.75), work_s=3.0)
    found = observed(pool_replica(), status(low), status(high))
    assert (found.running_requests, found.load_fraction, found.backlog_s) == (ENGINE.max_num_seqs // 2, 0.75, 3.0)


def test_the_load_of_a_replica_is_at_most_one() -> None:
    assert observed(pool_replica(), status(view(make_lease(), WorkerLoad(running_requests=10_000)))).load_fraction == 1.0


def test_demand_is_added_up_over_routers_and_models_are_in_order() -> None:
    queues = [
        ModelQueue(model=ModelId("n"), queued_requests=1),
        ModelQueue(model=M, queued_requests=1, queued_work_s=0.5),
        ModelQueue(model=M, queued_requests=2, queued_work_s=0.25),
    ]
    assert merge((), (), (), queues, {M: 7}, manual=(), is_complete=True).demands == (
        ModelDemand(model=M, queued_requests=3, queued_work_s=0.75, recent_requests=7),
        ModelDemand(model=ModelId("n"), queued_requests=1),
    )


class Cluster:
    """A register, routers by name with what they count, and an observer of them."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.register = MemoryRegister()
        self.totals: dict[str, int] = {}  # by router: requests of model "m" so far
        self.silent: set[str] = set()
        self.observer = Observer(self.register, self._channel, lambda: self.now_s)

    async def add_router(self, name: str, total: int = 0) -> None:
        self.totals[name] = total
        await self.register.renew(member(name, kind=MemberKind.ROUTER, address=name))

    async def see(self) -> Observation:
        return await self.observer.observe([pool_replica()], ())

    async def recent(self) -> int:
        """Requests since the last observation."""
        return (await self.see()).demands[0].recent_requests

    def _channel(self, address: str) -> grpc.aio.Channel:
        async def get_status(_: bytes) -> control_pb2.GetStatusResponse:
            if address in self.silent:
                raise UnavailableError("silent", reason=Reason.NO_REPLICA)
            queue = control_pb2.ModelQueue(model="m", queued_requests=1, requests_total=self.totals[address])
            replica = control_pb2.ReplicaStatus(lease=lease_to_pb(make_lease()), load=load_to_pb(WorkerLoad()), is_reachable=True)
            return control_pb2.GetStatusResponse(router_id=address, replicas=[replica], queues=[queue])

        return fake_channel({"tandem.v1.Control/GetStatus": get_status})


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def test_every_router_of_the_register_is_asked(cluster: Cluster) -> None:
    for name in ("a", "b"):
        await cluster.add_router(name)
    await cluster.register.renew(member("decode-0", address="decode-0:1"))
    observation = await cluster.see()
    assert observation.is_complete
    assert observation.demands == (ModelDemand(model=M, queued_requests=2),)
    assert observation.replicas[POOL][0].state is READY


async def test_a_silent_router_makes_the_observation_incomplete(cluster: Cluster) -> None:
    for name in ("a", "b"):
        await cluster.add_router(name)
    cluster.silent = {"b"}
    observation = await cluster.see()
    assert not observation.is_complete
    assert observation.demands[0].queued_requests == 1


async def test_no_router_at_all_is_incomplete(cluster: Cluster) -> None:
    assert not (await cluster.see()).is_complete


async def test_a_silent_register_is_incomplete_and_keeps_the_replicas(cluster: Cluster) -> None:
    await cluster.add_router("a")
    cluster.register.is_available = False
    observation = await cluster.see()
    assert not observation.is_complete
    assert [replica.replica_id for replica in observation.replicas[POOL]] == ["decode-0"]


async def test_requests_are_counted_from_when_a_router_is_first_heard(cluster: Cluster) -> None:
    await cluster.add_router("a", total=10)
    assert await cluster.recent() == 0
    cluster.totals["a"] = 13
    await cluster.add_router("b", total=50)
    assert await cluster.recent() == 3
    cluster.totals = {"a": 14, "b": 52}
    assert await cluster.recent() == 3


async def test_a_router_that_starts_again_counts_from_zero_not_below(cluster: Cluster) -> None:
    await cluster.add_router("a", total=10)
    await cluster.see()
    cluster.totals["a"] = 4
    assert await cluster.recent() == 4


async def test_what_a_router_served_while_it_was_silent_is_counted_once_it_answers(cluster: Cluster) -> None:
    for name in ("a", "b"):
        await cluster.add_router(name, total=10)
    await cluster.see()
    cluster.silent, cluster.totals["b"] = {"b"}, 15
    assert await cluster.recent() == 0
    cluster.silent = set()
    assert await cluster.recent() == 5


async def test_targets_set_by_hand_are_observed(cluster: Cluster) -> None:
    await cluster.register.set_manual_targets([PREFILL_TARGET])
    assert (await cluster.see()).manual_targets == (PREFILL_TARGET,)


def expiring(target: ReplicaTarget, expires_in_s: float) -> ReplicaTarget:
    return ReplicaTarget(model=target.model, role=target.role, replicas=target.replicas, expires_in_s=expires_in_s)


async def test_a_lost_register_gets_the_targets_set_by_hand_again_with_the_time_they_had_left(cluster: Cluster) -> None:
    await cluster.register.set_manual_targets([expiring(DECODE_TARGET, 60.0), PREFILL_TARGET])
    await cluster.see()
    cluster.register.restart_empty()
    cluster.now_s += 20.0
    assert set((await cluster.see()).manual_targets) == {expiring(DECODE_TARGET, 40.0), PREFILL_TARGET}


async def test_targets_that_expired_while_the_register_was_away_are_not_restored(cluster: Cluster) -> None:
    await cluster.register.set_manual_targets([expiring(DECODE_TARGET, 60.0)])
    await cluster.see()
    cluster.register.restart_empty()
    cluster.now_s += 60.0
    assert (await cluster.see()).manual_targets == ()


async def test_a_target_set_since_the_loss_is_newer_than_the_one_remembered(cluster: Cluster) -> None:
    await cluster.register.set_manual_targets([DECODE_TARGET, PREFILL_TARGET])
    await cluster.see()
    cluster.register.restart_empty()
    newer = ReplicaTarget(model=M, role=Role.DECODE, replicas=7)
    await cluster.register.set_manual_targets([newer])
    assert set((await cluster.see()).manual_targets) == {newer, PREFILL_TARGET}


async def test_a_register_that_fails_while_it_is_restored_is_restored_the_next_time() -> None:
    class Failing(MemoryRegister):
        fails = False

        async def set_manual_targets(self, targets: Sequence[ReplicaTarget]) -> None:
            if self.fails:
                raise UnavailableError("away", reason=Reason.NO_REGISTER)
            await super().set_manual_targets(targets)

    cluster = Cluster()
    cluster.register = failing = Failing()
    cluster.observer = Observer(failing, cluster._channel, lambda: cluster.now_s)
    await failing.set_manual_targets([DECODE_TARGET])
    await cluster.see()
    failing.restart_empty()
    failing.fails = True
    assert not (await cluster.see()).is_complete
    failing.fails = False
    assert (await cluster.see()).manual_targets == (DECODE_TARGET,)


async def test_a_register_that_is_filled_again_is_incomplete_until_everybody_can_be_back(cluster: Cluster) -> None:
    for name in ("a", "b"):
        await cluster.add_router(name)
    assert (await cluster.see()).is_complete
    cluster.register.restart_empty()
    await cluster.add_router("a")
    assert not (await cluster.see()).is_complete
    cluster.now_s += REFILL_S
    assert (await cluster.see()).is_complete
