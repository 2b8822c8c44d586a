"""How streams of workers end, what their receipts say and what routers see of them. Real gRPC, engines of a few lines."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from decode_workers.service import DecodeService
from tandem.channel_pool import ChannelPool
from tandem.convert import block_change_from_pb, lease_from_pb, step_from_pb
from tandem.domain import FinishReason, ReplicaState, Sampling, Usage
from tandem.engine.base import KvLoaded
from tandem.errors import DeadlineError, EngineError, InvalidRequestError, Reason, TandemError, UnavailableError
from tandem.held_blocks import BlockChange
from tandem.rpc import ResponseStream, ServerCall, call, open_stream, parse_answer
from tandem.step_sample import StepSample
from tandem.v1 import worker_pb2
from tests.worker_cluster import (
    INCARNATION,
    PROMPT_TOKENS,
    ROUTER_ID,
    WAIT_S,
    Answer,
    FakeCluster,
    Worker,
    first_chunk,
    has_run,
    read,
    running_cluster,
)

pytestmark = pytest.mark.integration

STEP = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=1, kv_tokens=10, duration_s=0.002)


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with running_cluster() as made:
        yield made


class TestEnds:
    @pytest.mark.parametrize("stage", ["prefill", "between", "decode", "alone"])
    async def test_a_client_that_goes_frees_all_at_any_stage(self, cluster: FakeCluster, stage: str) -> None:
        prefill, decode = cluster.prefill, cluster.decode
        match stage:
            case "prefill":
                prefill.engine.gate.clear()
            case "between":
                prefill.engine.publishes.clear()
            case "decode" | "alone":
                decode.engine.gate.clear()
        message = cluster.message() if stage == "alone" else cluster.message(prefill.planned)
        async with cluster.open(message) as stream:
            if stage in ("between", "decode"):
                assert (await first_chunk(stream)).token_ids == (6,)
            await has_run(prefill if stage in ("prefill", "between") else decode)
            assert decode.state.running_requests == 1
        await cluster.settle()

    async def test_a_deadline_that_passes_frees_all(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.gate.clear()
        with pytest.raises(DeadlineError):
            await cluster.run(cluster.message(cluster.prefill.planned), timeout_s=0.2)
        await cluster.settle()

    async def test_a_deadline_that_has_passed_is_told_with_its_stage(self, cluster: FakeCluster) -> None:
        class ExpiredCall(ServerCall):
            def __init__(self) -> None:
                """Not a real call."""

            def time_remaining_s(self) -> float:
                return 0.0

        channels = ChannelPool()
        decode = DecodeService(cluster.decode.engine, cluster.decode.state, channels, publish_wait_s=1.0)
        with pytest.raises(DeadlineError) as caught:
            await decode.generate(cluster.message(cluster.prefill.planned), ExpiredCall())
        assert caught.value.stage == "prefill"
        await channels.close()

    async def test_an_engine_that_fails_midway_is_an_error_that_can_be_retried(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.abort_reason = FinishReason.ERROR
        answer = Answer()
        with pytest.raises(EngineError) as caught:
            await cluster.run(cluster.message(cluster.prefill.planned), answer=answer)
        assert caught.value.retryable
        assert answer.token_ids == [6]

    async def test_an_engine_that_breaks_off_without_a_word_is_an_error_that_can_be_retried(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.breaks_off_after = 2
        answer = Answer()
        with pytest.raises(EngineError, match="early") as caught:
            await cluster.run(cluster.message(), answer=answer)
        assert caught.value.retryable
        assert answer.token_ids == [6, 7]

    async def test_a_worker_that_dies_is_an_error_that_can_be_retried(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.gate.clear()
        answer = Answer()
        running = asyncio.create_task(cluster.run(cluster.message(cluster.prefill.planned), answer=answer))
        await has_run(cluster.decode)
        await cluster.decode.die()
        with pytest.raises(TandemError) as caught:
            await running
        assert answer.token_ids == [6]
        assert (caught.value.retryable, caught.value.reason) == (True, Reason.CONNECTION_LOST)

    @pytest.mark.parametrize("incarnation", [INCARNATION - 1, INCARNATION + 1])
    async def test_work_for_another_incarnation_is_refused(self, cluster: FakeCluster, incarnation: int) -> None:
        with pytest.raises(UnavailableError) as caught:
            await cluster.run(cluster.message(incarnation=incarnation))
        assert (caught.value.reason, caught.value.retryable) == (Reason.STALE_INCARNATION, True)

    async def test_a_draining_worker_ends_what_it_has_and_takes_no_more(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.gate.clear()
        running = asyncio.create_task(cluster.run(cluster.message()))
        await has_run(cluster.decode)
        channel = ChannelPool()
        answer = await call(
            channel(cluster.decode.state.lease.address),
            "tandem.v1.Worker/Drain",
            worker_pb2.DrainRequest(),
            worker_pb2.DrainResponse,
            timeout_s=WAIT_S,
        )
        await channel.close()
        assert answer.running_requests == 1
        with pytest.raises(UnavailableError) as caught:
            await cluster.run(cluster.message())
        assert caught.value.reason is Reason.DRAINING
        cluster.decode.engine.gate.set()
        assert (await running).token_ids == [6, 7, 8, 9]

    async def test_the_same_attempt_twice_at_once_is_served_twice(self, cluster: FakeCluster) -> None:
        message = cluster.message(cluster.prefill.planned)
        cluster.prefill.engine.publishes.clear()
        cluster.decode.engine.gate.clear()
        running = [asyncio.create_task(cluster.run(message)) for _ in range(3)]
        await cluster.until(lambda: len(cluster.prefill.engine.requests) == 3)
        cluster.prefill.engine.publishes.set()
        await cluster.until(lambda: len(cluster.decode.engine.requests) == 3)
        cluster.decode.engine.gate.set()
        assert [(await one).token_ids for one in running] == [[6, 7, 8, 9]] * 3

    async def test_a_request_beyond_the_engines_limits_is_refused_by_name(self, cluster: FakeCluster) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await cluster.run(cluster.message(sampling=Sampling(max_tokens=65)))
        assert caught.value.field == "sampling.max_tokens"


class TestReceipt:
    async def test_a_hand_off_is_accounted_for(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.cached_tokens = 2
        cluster.decode.engine.loaded = KvLoaded(local_tokens=0, blocks=1, payload_bytes=1000)
        cluster.decode.engine.cached_tokens = 99  # what the engine says is not asked where the store was
        answer = await cluster.run(cluster.message(cluster.prefill.planned))
        receipt = answer.receipt
        assert receipt is not None
        assert receipt.handed_off
        assert (receipt.request_id, receipt.one_worker_reason) == ("r", "")
        assert (receipt.prefill_replica_id, receipt.decode_replica_id) == ("prefill-0", "decode-0")
        assert (receipt.prompt_tokens, receipt.output_tokens, receipt.cached_tokens) == (5, 4, 2)
        assert (receipt.decode_recomputed_tokens, receipt.kv_bytes_shipped) == (2, 1000)
        assert 0.0 < receipt.handoff_gap_s <= receipt.decode_s <= receipt.e2e_s
        assert 0.0 < receipt.transfer_s <= receipt.handoff_gap_s
        assert 0.0 < receipt.prefill_s <= receipt.e2e_s
        assert answer.chunks[-1].usage == Usage(prompt_tokens=5, output_tokens=4, cached_tokens=2)
        assert all(chunk.usage is None for chunk in answer.chunks[:-1])

    async def test_one_worker_is_accounted_for(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.cached_tokens = 4
        answer = await cluster.run(cluster.message(one_worker_reason="short"))
        receipt = answer.receipt
        assert receipt is not None
        assert (receipt.handed_off, receipt.one_worker_reason) == (False, "short")
        assert (receipt.prefill_replica_id, receipt.decode_replica_id) == ("decode-0", "decode-0")
        assert (receipt.cached_tokens, receipt.decode_recomputed_tokens, receipt.kv_bytes_shipped) == (4, 1, 0)
        assert (receipt.handoff_gap_s, receipt.transfer_s) == (0.0, 0.0)
        assert 0.0 < receipt.prefill_s <= receipt.e2e_s

    async def test_an_end_at_the_first_token_is_no_hand_off(self, cluster: FakeCluster) -> None:
        receipt = (await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=1)))).receipt
        assert receipt is not None
        assert (receipt.handed_off, receipt.prefill_replica_id, receipt.handoff_gap_s) == (False, "prefill-0", 0.0)


class TestWatch:
    @asynccontextmanager
    async def watching(self, worker: Worker, router_id: str = ROUTER_ID) -> AsyncIterator["Watching"]:
        channels = ChannelPool()
        request = worker_pb2.WatchRequest(router_id=router_id)
        async with open_stream(channels(worker.state.lease.address), "tandem.v1.Worker/Watch", request, timeout_s=WAIT_S) as stream:
            yield Watching(stream)
        await channels.close()

    async def test_the_lease_comes_first_and_then_load(self, cluster: FakeCluster) -> None:
        async with self.watching(cluster.decode) as watching:
            first = await watching.read()
            assert lease_from_pb(first.lease) == cluster.decode.state.lease
            assert (first.sequence, first.incarnation) == (0, INCARNATION)
            assert (first.load.kv_used_fraction, first.load.corrupt_blocks_total, first.load.missing_blocks_total) == (0.25, 1, 2)
            assert (first.load.loaded_bytes_total, first.load.published_bytes_total) == (3, 4)
            for sequence in (1, 2, 3):
                message = await watching.read()
                assert not message.HasField("lease")
                assert message.HasField("load")
                assert (message.sequence, message.incarnation) == (sequence, INCARNATION)

    async def test_the_lease_comes_again_when_it_changes(self, cluster: FakeCluster) -> None:
        async with self.watching(cluster.decode) as watching:
            await watching.read()
            cluster.decode.state.drain()
            while not (message := await watching.read()).HasField("lease"):
                pass
            assert lease_from_pb(message.lease).state is ReplicaState.DRAINING

    async def test_the_stream_ends_with_what_runs_on_a_worker_that_ends(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.gate.clear()
        async with self.watching(cluster.decode) as watching, cluster.open(cluster.message()) as stream:
            while (await watching.read()).load.running_requests == 0:
                pass
            cluster.decode.state.end()
            while not (await watching.read()).HasField("lease"):
                pass
            cluster.decode.engine.gate.set()
            while await read(stream) is not None:
                pass
            async with asyncio.timeout(WAIT_S):
                while await watching.has_more():
                    pass

    async def test_a_request_is_stamped_on_both_workers_with_the_routers_attempt(self, cluster: FakeCluster) -> None:
        accepted, finished = worker_pb2.RequestStamp.KIND_ACCEPTED, worker_pb2.RequestStamp.KIND_FINISHED
        async with self.watching(cluster.prefill) as prefill, self.watching(cluster.decode) as decode:
            for watching in (prefill, decode):
                await watching.read()  # from here on the worker knows of the stream
            await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
            for watching in (prefill, decode):
                assert await watching.stamps(2) == [("r", 1, accepted), ("r", 1, finished)]

    async def test_every_router_is_told_of_all_measured_steps(self, cluster: FakeCluster) -> None:
        async with self.watching(cluster.decode) as one, self.watching(cluster.decode, "router-2") as other:
            for watching in (one, other):
                await watching.read()  # from here on the worker knows of the stream
            for kv_tokens in (5, 6):
                cluster.decode.engine.measured = (replace(STEP, kv_tokens=kv_tokens),)
                for watching in (one, other):
                    while not (message := await watching.read()).steps:
                        pass
                    assert [step_from_pb(step).kv_tokens for step in message.steps] == [kv_tokens]

    async def test_every_router_is_told_what_the_engine_has_cached(self, cluster: FakeCluster) -> None:
        first, second = bytes(range(8)), bytes(range(8, 16))
        cluster.decode.engine.blocks.apply(BlockChange(stored=first))
        async with self.watching(cluster.decode) as one, self.watching(cluster.decode, "router-2") as other:
            for watching in (one, other):
                assert block_change_from_pb((await watching.read()).block_events) == BlockChange(is_cleared=True, stored=first)
            cluster.decode.engine.blocks.apply(BlockChange(stored=second, removed=first))
            for watching in (one, other):
                while not (message := await watching.read()).block_events:
                    pass
                assert block_change_from_pb(message.block_events) == BlockChange(stored=second, removed=first)

    async def test_a_router_is_told_of_its_own_requests_only(self, cluster: FakeCluster) -> None:
        async with self.watching(cluster.decode, "router-2") as watching:
            await watching.read()
            await cluster.run(cluster.message())
            for _ in range(3):
                assert not (await watching.read()).stamps

    @pytest.mark.parametrize(("planned_tokens", "pending_tokens"), [(0, PROMPT_TOKENS), (2, 2), (2**32 - 1, PROMPT_TOKENS)])
    async def test_load_counts_what_runs_and_what_it_has_to_compute_by_its_plan(
        self, cluster: FakeCluster, planned_tokens: int, pending_tokens: int
    ) -> None:
        cluster.decode.engine.gate.clear()
        request = cluster.message()
        request.plan.prefill_tokens = planned_tokens
        async with self.watching(cluster.decode) as watching, cluster.open(request) as stream:
            while (message := await watching.read()).load.running_requests == 0:
                pass
            assert (message.load.pending_prefill_tokens, message.load.kv_tokens) == (pending_tokens, PROMPT_TOKENS)
            cluster.decode.engine.gate.set()
            while await read(stream) is not None:
                pass
            while (message := await watching.read()).load.running_requests:
                pass
            assert (message.load.pending_prefill_tokens, message.load.kv_tokens, message.load.generated_tokens_total) == (0, 0, 4)


class Watching:
    """A Watch stream."""

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream

    async def has_more(self) -> bool:
        """Reads on; False at the end."""
        return await self._stream.read() is not None

    async def read(self) -> worker_pb2.WatchResponse:
        payload = await self._stream.read()
        assert payload is not None
        return parse_answer(worker_pb2.WatchResponse, payload)

    async def stamps(self, count: int) -> list[tuple[str, int, int]]:
        """So many stamps, however many messages they take."""
        stamps: list[tuple[str, int, int]] = []
        while len(stamps) < count:
            stamps += [(stamp.request_id, stamp.attempt, stamp.kind) for stamp in (await self.read()).stamps]
        return stamps
