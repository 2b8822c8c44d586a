"""Whom the router watches as leases come and go, and what becomes of a worker whose lease ran out."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from random import Random
from typing import cast

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.shell import RouterShell
from router.workers import Workers
from tandem.convert import block_change_to_pb, lease_to_pb, step_to_pb
from tandem.domain import BlockHash, Lease, PlannedWorker, ReplicaId, ReplicaState
from tandem.errors import UnavailableError
from tandem.held_blocks import BlockChange
from tandem.step_sample import StepSample
from tandem.telemetry import RouterMetrics
from tandem.v1 import worker_pb2
from tests.fake_channel import FakeChannel
from tests.samples import make_lease

STEP = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=1, kv_tokens=10, duration_s=0.002)
A, B = make_lease("a", address="a:1"), make_lease("b", address="b:1")


class Core(RouterCore):
    """Notes the steps that come."""

    def __init__(self, config: RouterConfig, rng: Random) -> None:
        super().__init__(config, rng)
        self.told: list[tuple[str, int, list[StepSample]]] = []

    def steps(self, replica_id: ReplicaId, incarnation: int, samples: Sequence[StepSample], now_s: float) -> bool:
        self.told.append((replica_id, incarnation, list(samples)))
        return super().steps(replica_id, incarnation, samples, now_s)


class Bench:
    """Workers over fake channels."""

    def __init__(self, *fixed: str) -> None:
        config = RouterConfig(watch_silence_s=3600.0)
        core = Core(config, Random(1))
        self.steps = core.told
        self.shell = RouterShell(config, core, RouterMetrics(CollectorRegistry()), lambda: 0.0)
        self.channels: dict[str, FakeChannel] = {}
        self.opened: list[str] = []
        self.workers = Workers(fixed, self.shell, Random(2), self._connect)

    async def says(self, lease: Lease) -> None:
        """The worker at the lease's address sends it."""
        self.channels[lease.address].streams[-1].put(worker_pb2.WatchResponse(incarnation=lease.incarnation, lease=lease_to_pb(lease)))
        await settle()

    async def ends(self, address: str) -> None:
        """The worker's stream comes to its end."""
        self.channels[address].streams[-1].put(None)
        await settle()

    @property
    def states(self) -> dict[str, ReplicaState]:
        """The replicas that requests may go to, or not, as the core knows them."""
        return {lease.replica_id: lease.state for lease in self.shell.core.fleet.leases}

    def called(self, lease: Lease) -> FakeChannel:
        """The channel by which a plan for that replica is carried out."""
        return cast("FakeChannel", self.workers.channel(planned(lease)))

    def _connect(self, address: str) -> grpc.aio.Channel:
        self.opened.append(address)
        channel = self.channels[address] = FakeChannel()
        return cast("grpc.aio.Channel", channel)


async def settle() -> None:
    """Lets every task run as far as it gets by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def watching(*fixed: str) -> AsyncIterator[Bench]:
    bench = Bench(*fixed)
    task = asyncio.create_task(bench.workers.watch_forever())
    await settle()
    yield bench
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert all(channel.is_closed for channel in bench.channels.values())


def planned(lease: Lease) -> PlannedWorker:
    return PlannedWorker(replica_id=lease.replica_id, incarnation=lease.incarnation, address=lease.address)


async def test_new_addresses_are_watched_once_and_in_order() -> None:
    async with watching() as bench:
        bench.workers.follow(["b:1", "a:1"])
        bench.workers.follow(["a:1", "b:1"])
        await settle()
        assert bench.opened == ["a:1", "b:1"]
        await bench.says(A)
        assert bench.states == {"a": ReplicaState.READY}
        assert bench.called(A) is bench.channels["a:1"]


async def test_what_is_followed_before_the_start_is_watched_after_it() -> None:
    bench = Bench()
    bench.workers.follow(["a:1"])
    task = asyncio.create_task(bench.workers.watch_forever())
    await settle()
    await bench.says(A)
    assert list(bench.states) == ["a"]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_worker_whose_lease_ran_out_gets_no_new_work_and_keeps_its_stream() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1"])
        await settle()
        await bench.says(A)
        bench.workers.follow([])
        await settle()
        assert bench.states == {"a": ReplicaState.STARTING}
        assert not bench.channels["a:1"].streams[-1].was_cancelled
        assert bench.called(A) is bench.channels["a:1"]
        await bench.says(A)
        assert bench.states == {"a": ReplicaState.STARTING}


async def test_a_worker_whose_lease_comes_back_takes_work_again() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1"])
        await settle()
        await bench.says(A)
        bench.workers.follow([])
        bench.workers.follow(["a:1"])
        assert bench.states == {"a": ReplicaState.READY}
        assert bench.opened == ["a:1"]


async def test_a_worker_that_drains_by_itself_still_does_when_its_lease_comes_back() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1"])
        await settle()
        await bench.says(replace(A, state=ReplicaState.DRAINING))
        bench.workers.follow([])
        bench.workers.follow(["a:1"])
        assert bench.states == {"a": ReplicaState.DRAINING}


async def test_a_worker_without_a_lease_is_forgotten_once_it_does_not_answer() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1"])
        await settle()
        await bench.says(A)
        bench.workers.follow([])
        await bench.ends("a:1")
        assert bench.states == {}
        assert bench.workers.unreachable() == [A]
        bench.workers.follow([])
        await settle()
        assert bench.workers.unreachable() == []
        assert bench.channels["a:1"].is_closed


async def test_a_worker_that_answers_no_more_and_has_a_lease_is_kept() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1"])
        await settle()
        await bench.says(A)
        await bench.ends("a:1")
        bench.workers.follow(["a:1"])
        await settle()
        assert bench.workers.unreachable() == [A]
        assert not bench.channels["a:1"].is_closed


async def test_a_worker_at_a_fixed_address_needs_no_lease() -> None:
    async with watching("a:1") as bench:
        await bench.says(A)
        bench.workers.follow([])
        assert bench.states == {"a": ReplicaState.READY}
        bench.workers.follow(["a:1"])
        assert bench.opened == ["a:1"]


async def test_a_replica_that_started_again_elsewhere_is_called_there() -> None:
    async with watching() as bench:
        bench.workers.follow(["a:1", "b:1"])
        await settle()
        await bench.says(A)
        again = replace(A, incarnation=2, address="b:1")
        await bench.says(again)
        assert bench.called(again) is bench.channels["b:1"]
        with pytest.raises(UnavailableError, match="replica x is not reachable"):
            bench.workers.channel(planned(make_lease("x")))


async def test_a_plan_for_an_older_incarnation_does_not_reach_the_newer_one() -> None:
    async with watching("a:1") as bench:
        await bench.says(replace(A, incarnation=2))
        with pytest.raises(UnavailableError):
            bench.workers.channel(planned(A))


async def test_measured_steps_reach_the_core_with_their_replica() -> None:
    async with watching("a:1") as bench:
        await bench.says(A)
        bench.channels["a:1"].streams[-1].put(worker_pb2.WatchResponse(incarnation=A.incarnation, sequence=1, steps=[step_to_pb(STEP)]))
        bench.channels["a:1"].streams[-1].put(worker_pb2.WatchResponse(incarnation=99, sequence=2, steps=[step_to_pb(STEP)]))
        await settle()
        assert bench.steps == [("a", A.incarnation, [STEP]), ("a", 99, [STEP])]


async def test_a_report_from_the_future_is_counted_and_the_next_one_is_believed() -> None:
    async with watching("a:1") as bench:
        await bench.says(A)
        for sequence, running in ((2**63, 9), (1, 3)):
            load = worker_pb2.WorkerLoad(running_requests=running)
            message = worker_pb2.WatchResponse(incarnation=A.incarnation, sequence=sequence, load=load)
            bench.channels["a:1"].streams[-1].put(message)
        await settle()
        (dropped,) = bench.shell.metrics.dropped_reports.collect()
        assert dropped.samples[0].value == 1
        assert bench.shell.core.replicas(0.0)[0].load.running_requests == 3


async def test_cached_blocks_reach_the_index_and_go_with_their_replica() -> None:
    def told(change: BlockChange, incarnation: int = A.incarnation) -> worker_pb2.WatchResponse:
        return worker_pb2.WatchResponse(incarnation=incarnation, block_events=block_change_to_pb(change))

    hashes = [BlockHash(hashlib.sha256(bytes([number])).digest()) for number in range(3)]
    short = [block_hash[:8] for block_hash in hashes]
    holder = (A.replica_id, A.incarnation)
    async with watching("a:1") as bench:
        prefixes = bench.shell.core.prefixes
        await bench.says(A)
        stream = bench.channels["a:1"].streams[-1]
        stream.put(told(BlockChange(is_cleared=True, stored=b"".join(short))))
        await settle()
        assert prefixes.match(hashes) == {holder: 3}
        stream.put(told(BlockChange(removed=short[2])))
        stream.put(told(BlockChange(removed=short[0]), incarnation=99))
        await settle()
        assert prefixes.match(hashes) == {holder: 2}
        stream.put(told(BlockChange(is_cleared=True, stored=short[0])))
        await settle()
        assert prefixes.match(hashes) == {holder: 1}
        await bench.ends("a:1")
        assert prefixes.match(hashes) == {}


async def test_block_events_that_are_none_break_the_stream() -> None:
    async with watching("a:1") as bench:
        await bench.says(A)
        odd = worker_pb2.BlockEvent(kind=worker_pb2.BlockEvent.KIND_STORED, short_hashes=b"1234567")
        bench.channels["a:1"].streams[-1].put(worker_pb2.WatchResponse(incarnation=A.incarnation, block_events=[odd]))
        await settle()
        assert bench.states == {}
