"""Hand-off between nodes: real gRPC, engines of a few lines, and a store service of the decode node that does what it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry

from decode_workers.remote_blocks import RemoteBlocks
from decode_workers.service import DecodeService
from kv_transfer.blocks import block_hashes
from prefill_workers.service import PrefillService
from tandem.channel_pool import ChannelPool
from tandem.convert import chunk_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.domain import Namespace, Plan, PlannedWorker, Receipt, Role, Sampling
from tandem.errors import DeadlineError, Reason, TandemError, UnavailableError
from tandem.faults import Faults
from tandem.replica import WorkerService
from tandem.rpc import ServerCall, open_stream, parse_answer, service, start_server
from tandem.telemetry import RemoteKvMetrics
from tandem.v1 import common_pb2, inference_pb2, store_pb2, worker_pb2
from tandem.worker_state import WorkerState
from tests.fake_engine import INFO, FakeEngine
from tests.samples import make_lease, make_request
from tests.store_nodes import until

pytestmark = pytest.mark.integration

NAMESPACE = Namespace("ab" * 16)
FAR_STORE = "far:7"
PROMPT_TOKENS = 13  # three full blocks of four
EXPECTED = [14, 15, 16, 17]
WAIT_S = 10.0


@dataclass
class FakeStore:
    """The Store service of the decode worker's node: `followed` are asked for as prefill starts, `asked` once it has ended."""

    held_blocks: int | None = None  # None: all that were asked for
    error: TandemError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[store_pb2.CopyRequest] = field(default_factory=list)
    followed: list[store_pb2.CopyRequest] = field(default_factory=list)
    given_up: list[store_pb2.CopyRequest] = field(default_factory=list)

    async def copy(self, request: store_pb2.CopyRequest, its_call: ServerCall) -> store_pb2.CopyResponse:
        (self.followed if request.wait_ms else self.asked).append(request)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up.append(request)
            raise
        if self.error is not None:
            raise self.error
        held_blocks = len(request.block_hashes) if self.held_blocks is None else self.held_blocks
        return store_pb2.CopyResponse(copied_blocks=held_blocks if request.wait_ms else 0, held_blocks=held_blocks)

    async def refuse(self, request: object, its_call: ServerCall) -> None:
        raise AssertionError

    stat = lookup = prefetch = evict = watch = refuse


class Replica:
    """A worker with a fake engine, on its node."""

    def __init__(self, role: Role, node: str, store_address: str, channels: ChannelPool) -> None:
        self.engine = FakeEngine()
        self.registry = CollectorRegistry()
        lease = make_lease(str(role), role, 1, engine=INFO, node=node, namespace=NAMESPACE, store_address=store_address)
        self.state = WorkerState(lease)
        self.remote = RemoteBlocks(self.engine, self.state, channels, RemoteKvMetrics(self.registry), wait_s=1.0)
        self.services = WorkerService(
            PrefillService(self.engine, self.state, publish_wait_s=WAIT_S, faults=Faults.parse("")),
            DecodeService(self.engine, self.state, channels, publish_wait_s=1.0, remote_blocks=self.remote),
            self.engine,
            self.state,
            watch_interval_s=0.05,
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tandem_kv_remote_{name}", labels) or 0.0


class Nodes:
    """A prefill worker on one node, a decode worker and its store on another."""

    def __init__(self, channels: ChannelPool, store_address: str) -> None:
        self.store = FakeStore()
        self.store.gate.set()
        self.prefill = Replica(Role.PREFILL, "far", FAR_STORE, channels)
        self.decode = Replica(Role.DECODE, "near", store_address, channels)
        self.channels = channels

    async def run(self, *, prompt_tokens: int = PROMPT_TOKENS, timeout_s: float = WAIT_S, **changes: object) -> tuple[list[int], Receipt]:
        prefill, decode = (
            PlannedWorker(
                replica_id=lease.replica_id,
                incarnation=lease.incarnation,
                address=lease.address,
                node=lease.node,
                store_address=lease.store_address,
            )
            for lease in (self.prefill.state.lease, self.decode.state.lease)
        )
        request = make_request("r", prompt_tokens, Sampling(max_tokens=4), **changes)
        message = request_to_worker_pb(request, Plan(plan_id="p", prefill=(prefill,), decode=decode, router_id="router"), 1, 1)
        token_ids: list[int] = []
        async with open_stream(self.channels(decode.address), "tandem.v1.Worker/Generate", message, timeout_s=timeout_s) as stream:
            async for payload in stream:
                token_ids += chunk_from_pb(parse_answer(inference_pb2.GenerateResponse, payload)).token_ids
            receipt = await stream.receipt()
        assert receipt is not None
        return token_ids, receipt_from_pb(parse_answer(common_pb2.Receipt, receipt))


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        channels = ChannelPool()
        store = FakeStore()
        store.gate.set()
        store_server = await start_server("127.0.0.1", 0, {"tandem.v1.Store": service(store_pb2, "Store", store)})
        stack.push_async_callback(store_server.stop, 0.0)
        made = Nodes(channels, store_server.address)
        made.store = store
        for replica in (made.prefill, made.decode):
            server = await start_server("127.0.0.1", 0, {"tandem.v1.Worker": service(worker_pb2, "Worker", replica.services)})
            stack.push_async_callback(server.stop, 0.0)
            replica.state.set_addresses(server.address, "")
        stack.push_async_callback(channels.close)
        yield made


def hashes(tokens: int, salt: str = "") -> list[bytes]:
    return [bytes(block_hash) for block_hash in block_hashes(range(1, tokens + 1), INFO.block_size_tokens, salt)]


class TestAsking:
    async def test_the_decode_nodes_store_is_asked_for_the_published_blocks(self, nodes: Nodes) -> None:
        nodes.prefill.engine.gate.clear()
        running = asyncio.create_task(nodes.run())
        await until(lambda: nodes.decode.metric("copied_blocks_total") == 3)
        nodes.prefill.engine.gate.set()
        token_ids, receipt = await running
        assert token_ids == EXPECTED
        assert receipt.handed_off
        (asked,) = nodes.store.asked
        assert (asked.namespace, asked.from_address, list(asked.block_hashes)) == (NAMESPACE, FAR_STORE, hashes(12))
        assert nodes.decode.metric("copies_total", outcome="copied") == 1
        assert (nodes.decode.metric("copied_blocks_total"), nodes.decode.metric("recomputed_blocks_total")) == (3, 0)

    async def test_the_engine_starts_when_the_blocks_are_here_and_the_first_token_does_not_wait(self, nodes: Nodes) -> None:
        nodes.store.gate.clear()
        running = asyncio.create_task(nodes.run())
        async with asyncio.timeout(WAIT_S):
            await nodes.prefill.engine.has_run.wait()
        await asyncio.sleep(0.2)
        assert nodes.decode.state.generated_tokens_total == 1
        assert nodes.decode.engine.requests == []
        nodes.store.gate.set()
        token_ids, receipt = await running
        assert token_ids == EXPECTED
        assert receipt.transfer_s > 0.1

    async def test_resumed_tokens_and_salt_are_part_of_the_names(self, nodes: Nodes) -> None:
        await nodes.run(prompt_tokens=11, resume_token_ids=(12, 13), cache_salt="tenant")
        assert list(nodes.store.asked[0].block_hashes) == hashes(12, "tenant")

    async def test_blocks_that_were_not_published_are_not_asked_for(self, nodes: Nodes) -> None:
        nodes.prefill.engine.info = replace(INFO, block_size_tokens=6)  # publishes two
        await nodes.run()
        assert list(nodes.store.asked[0].block_hashes) == hashes(8)

    async def test_without_a_full_block_nobody_is_asked(self, nodes: Nodes) -> None:
        token_ids, _ = await nodes.run(prompt_tokens=3)
        assert (token_ids, nodes.store.asked, nodes.store.followed) == ([4, 5, 6, 7], [], [])

    async def test_all_chunks_are_asked_for_as_prefill_starts_and_waited_for_as_they_come(self, nodes: Nodes) -> None:
        nodes.prefill.engine.gate.clear()
        running = asyncio.create_task(nodes.run())
        await until(lambda: bool(nodes.store.followed))
        assert nodes.prefill.state.generated_tokens_total == 0
        (followed,) = nodes.store.followed
        assert (followed.namespace, followed.from_address, list(followed.block_hashes)) == (NAMESPACE, FAR_STORE, hashes(12))
        assert followed.wait_ms == 30_000
        nodes.prefill.engine.gate.set()
        assert (await running)[0] == EXPECTED
        assert [len(asked.block_hashes) for asked in nodes.store.asked] == [3]
        assert nodes.decode.metric("copies_total", outcome="copied") == 1

    async def test_what_will_not_be_published_is_no_longer_waited_for(self, nodes: Nodes) -> None:
        nodes.prefill.engine.info = replace(INFO, block_size_tokens=6)  # publishes two of the three
        nodes.store.gate.clear()
        running = asyncio.create_task(nodes.run())
        await until(lambda: bool(nodes.store.given_up and nodes.store.asked))
        nodes.store.gate.set()
        assert (await running)[0] == EXPECTED
        assert (len(nodes.store.given_up[0].block_hashes), len(nodes.store.asked[0].block_hashes)) == (3, 2)

    async def test_of_a_worker_that_is_lost_nothing_is_waited_for(self, nodes: Nodes) -> None:
        nodes.prefill.engine.error = UnavailableError("gone", reason=Reason.WORKER_LOST)
        nodes.store.gate.clear()
        async with asyncio.timeout(WAIT_S / 2):
            token_ids, receipt = await nodes.run()
        assert (token_ids, receipt.one_worker_reason, nodes.store.asked) == (EXPECTED, "prefill_lost", [])
        await until(lambda: nodes.store.given_up == nodes.store.followed)

    async def test_an_end_at_the_first_token_asks_for_nothing(self, nodes: Nodes) -> None:
        nodes.prefill.engine.eos_after = 0
        await nodes.run()
        assert nodes.store.asked == []
        await until(lambda: nodes.decode.state.running_requests == 0)

    @pytest.mark.parametrize("where", ["one node", "no store there", "no store here"])
    async def test_without_two_nodes_with_stores_nobody_is_asked(self, nodes: Nodes, where: str) -> None:
        near, far = nodes.decode.state, nodes.prefill.state
        match where:
            case "one node":
                far.lease = replace(far.lease, node="near")
            case "no store there":
                far.lease = replace(far.lease, store_address="")
            case "no store here":
                near.lease = replace(near.lease, store_address="")
        assert (await nodes.run())[0] == EXPECTED
        assert nodes.store.asked == nodes.store.followed == []


class TestFailures:
    async def test_what_is_not_there_is_computed_and_counted(self, nodes: Nodes) -> None:
        nodes.store.held_blocks = 1
        assert (await nodes.run())[0] == EXPECTED
        assert nodes.decode.metric("copies_total", outcome="partial") == 1
        assert nodes.decode.metric("recomputed_blocks_total") == 2

    async def test_a_store_that_fails_costs_nothing_but_the_blocks(self, nodes: Nodes) -> None:
        nodes.store.error = UnavailableError("the other store is gone", reason=Reason.WORKER_LOST)
        for _ in range(2):
            assert (await nodes.run())[0] == EXPECTED
        assert nodes.decode.metric("copies_total", outcome="failed") == 2
        assert nodes.decode.metric("recomputed_blocks_total") == 6

    async def test_a_store_that_is_dead_costs_nothing_but_the_blocks(self, nodes: Nodes) -> None:
        nodes.decode.state.lease = replace(nodes.decode.state.lease, store_address="127.0.0.1:1")
        assert (await nodes.run())[0] == EXPECTED
        assert nodes.decode.metric("copies_total", outcome="failed") == 1

    async def test_a_store_that_hangs_costs_one_request_its_bound_and_the_next_nothing(self, nodes: Nodes) -> None:
        nodes.store.gate.clear()
        async with asyncio.timeout(WAIT_S / 2):
            assert (await nodes.run())[0] == EXPECTED
        for _ in range(3):
            assert (await nodes.run())[0] == EXPECTED
        assert (len(nodes.store.followed), len(nodes.store.asked)) == (1, 1)
        assert nodes.decode.metric("copies_total", outcome="timeout") == 1
        assert nodes.decode.metric("copies_total", outcome="paused") == 3

    async def test_the_requests_deadline_ends_the_wait(self, nodes: Nodes) -> None:
        nodes.store.gate.clear()
        with pytest.raises(DeadlineError):
            await nodes.run(timeout_s=0.5)
        await until(lambda: nodes.decode.state.running_requests == 0 and len(nodes.store.given_up) == 2)

    async def test_what_a_lost_prefill_worker_had_published_is_asked_for(self, nodes: Nodes) -> None:
        nodes.prefill.engine.publish_error = UnavailableError("gone", reason=Reason.WORKER_LOST)
        assert (await nodes.run())[0] == EXPECTED
        assert list(nodes.store.asked[0].block_hashes) == hashes(12)
