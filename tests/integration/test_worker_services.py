"""Prefill and decode workers over real gRPC on loopback, with engines of a few lines: token n is followed by n + 1, each one a word."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from decode_workers.service import DecodeService
from prefill_workers.service import PrefillService
from tandem.convert import chunk_from_pb, lease_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.domain import (
    Chunk,
    FinishReason,
    Plan,
    PlannedWorker,
    Receipt,
    ReplicaId,
    ReplicaState,
    Role,
    Sampling,
    StructuredKind,
    StructuredOutput,
    Usage,
)
from tandem.engine.base import KvLoaded
from tandem.errors import (
    CancelledRequestError,
    DeadlineError,
    EngineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    Reason,
    TandemError,
    UnavailableError,
)
from tandem.faults import Faults
from tandem.replica import ChannelPool, WorkerService
from tandem.rpc import ResponseStream, Server, ServerCall, call, open_stream, parse_answer, service, start_server
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tandem.worker_state import WorkerState
from tests.fake_engine import EOS, INFO, FakeEngine, logprobs_of
from tests.samples import make_lease, make_request

pytestmark = pytest.mark.integration

PROMPT_TOKENS = 5  # 1, 2, 3, 4, 5: the first output token is 6
ROUTER_ID = "router-1"
INCARNATION = 7
WAIT_S = 10.0


class Worker:
    """One replica with a fake engine, served on loopback."""

    def __init__(self, replica_id: str, role: Role, channels: ChannelPool) -> None:
        self.engine = FakeEngine()
        self.state = WorkerState(make_lease(replica_id, role, INCARNATION, engine=INFO))
        self._services = WorkerService(
            PrefillService(self.engine, self.state, publish_wait_s=WAIT_S, faults=Faults.parse("")),
            DecodeService(self.engine, self.state, channels, publish_wait_s=0.3),
            self.engine,
            self.state,
            watch_interval_s=0.02,
        )
        self.server: Server | None = None

    async def start(self) -> None:
        self.server = await start_server("127.0.0.1", 0, {"tandem.v1.Worker": service(worker_pb2, "Worker", self._services)})
        self.state.set_addresses(self.server.address, "")

    @property
    def planned(self) -> PlannedWorker:
        """The worker as plans name it."""
        lease = self.state.lease
        return PlannedWorker(replica_id=lease.replica_id, incarnation=lease.incarnation, address=lease.address)

    async def die(self) -> None:
        """Cuts all streams and stops listening."""
        if self.server is not None:
            server, self.server = self.server, None
            await server.stop(0.0)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held for any request."""
        state = self.state
        return self.engine.is_idle and (state.running_requests, state.pending_prefill_tokens, state.kv_tokens) == (0, 0, 0)


@dataclass
class Answer:
    """One stream, as far as it was read."""

    chunks: list[Chunk] = field(default_factory=list)
    receipt: Receipt | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def end(self) -> tuple[FinishReason | None, str | None]:
        return self.chunks[-1].finish_reason, self.chunks[-1].stop_reason


class Cluster:
    """Two prefill workers and a decode worker."""

    def __init__(self, channels: ChannelPool) -> None:
        self.prefill = Worker("prefill-0", Role.PREFILL, channels)
        self.second = Worker("prefill-1", Role.PREFILL, channels)
        self.decode = Worker("decode-0", Role.DECODE, channels)
        self.workers = (self.prefill, self.second, self.decode)
        self._channels = channels

    def message(
        self,
        *prefill: PlannedWorker,
        sampling: Sampling | None = None,
        resume: tuple[int, ...] = (),
        one_worker_reason: str = "",
        incarnation: int = INCARNATION,
    ) -> worker_pb2.WorkerGenerateRequest:
        plan = Plan(plan_id="p", prefill=prefill, decode=self.decode.planned, router_id=ROUTER_ID, one_worker_reason=one_worker_reason)
        request = make_request("r", PROMPT_TOKENS, sampling or Sampling(max_tokens=4), resume_token_ids=resume)
        return request_to_worker_pb(request, plan, 1, incarnation)

    @asynccontextmanager
    async def open(self, message: worker_pb2.WorkerGenerateRequest, *, timeout_s: float = WAIT_S) -> AsyncIterator[ResponseStream]:
        channel = self._channels(self.decode.state.lease.address)
        async with open_stream(channel, "tandem.v1.Worker/Generate", message, timeout_s=timeout_s) as stream:
            yield stream

    async def run(self, message: worker_pb2.WorkerGenerateRequest, *, timeout_s: float = WAIT_S, answer: Answer | None = None) -> Answer:
        """Reads a stream to its end; `answer` keeps what came before an error."""
        answer = answer or Answer()
        async with self.open(message, timeout_s=timeout_s) as stream:
            while (chunk := await read(stream)) is not None:
                answer.chunks.append(chunk)
            receipt = await stream.receipt()
        assert receipt is not None
        answer.receipt = receipt_from_pb(parse_answer(common_pb2.Receipt, receipt))
        return answer

    async def settle(self) -> None:
        """Waits until nothing is held anywhere."""
        await self.until(lambda: all(worker.is_idle for worker in self.workers))

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Waits until it is so; fails after 10 s with the workers that hold something."""
        for _ in range(2_000):
            if is_so():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"busy: {[worker.state.lease.replica_id for worker in self.workers if not worker.is_idle]}")


async def read(stream: ResponseStream) -> Chunk | None:
    payload = await stream.read()
    return None if payload is None else chunk_from_pb(parse_answer(inference_pb2.GenerateResponse, payload))


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """At the end nothing may be held by anyone, whatever the test did."""
    channels = ChannelPool()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(channels.close)
        made = Cluster(channels)
        for worker in made.workers:
            await worker.start()
            stack.push_async_callback(worker.die)
        yield made
        await made.settle()


async def first_chunk(stream: ResponseStream) -> Chunk:
    chunk = await read(stream)
    assert chunk is not None
    return chunk


async def has_run(worker: Worker) -> None:
    async with asyncio.timeout(WAIT_S):
        await worker.engine.has_run.wait()


class TestHandOff:
    async def test_both_workers_together_give_the_tokens_of_one(self, cluster: Cluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned))
        alone = await cluster.run(cluster.message())
        assert answer.token_ids == alone.token_ids == [6, 7, 8, 9]
        assert answer.text == alone.text == "w6 w7 w8 w9 "
        assert answer.end == alone.end == (FinishReason.LENGTH, None)
        assert [chunk.first_position for chunk in answer.chunks] == [0, 1, 2, 3]

    async def test_the_first_token_does_not_wait_for_the_blocks(self, cluster: Cluster) -> None:
        cluster.prefill.engine.publishes.clear()
        async with cluster.open(cluster.message(cluster.prefill.planned)) as stream:
            assert (await first_chunk(stream)).token_ids == (6,)
            assert cluster.decode.engine.requests == []
            cluster.prefill.engine.publishes.set()
            assert (await first_chunk(stream)).token_ids == (7,)
            while await read(stream) is not None:
                pass

    async def test_the_decode_engine_starts_from_prompt_and_first_token(self, cluster: Cluster) -> None:
        await cluster.run(cluster.message(cluster.prefill.planned))
        (prefill,), (decode,) = cluster.prefill.engine.requests, cluster.decode.engine.requests
        assert (prefill.token_ids, prefill.max_new_tokens) == ((1, 2, 3, 4, 5), 1)
        assert (decode.token_ids, decode.max_new_tokens) == ((1, 2, 3, 4, 5, 6), 3)

    async def test_priority_and_salt_reach_both_engines(self, cluster: Cluster) -> None:
        message = cluster.message(cluster.prefill.planned)
        message.priority, message.cache_salt = -3, "tenant"
        await cluster.run(message)
        for worker in (cluster.prefill, cluster.decode):
            assert [(request.priority, request.cache_salt) for request in worker.engine.requests] == [(-3, "tenant")]

    async def test_eos_as_the_first_token_ends_it_without_a_decode_run(self, cluster: Cluster) -> None:
        cluster.prefill.engine.eos_after = PROMPT_TOKENS
        answer = await cluster.run(cluster.message(cluster.prefill.planned))
        assert (answer.token_ids, answer.text, answer.end) == ([EOS], "", (FinishReason.STOP, None))
        assert cluster.decode.engine.requests == []

    async def test_a_stop_token_as_the_first_token_ends_it_with_its_reason(self, cluster: Cluster) -> None:
        sampling = Sampling(max_tokens=4, stop_token_ids=(6,))
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "", (FinishReason.STOP, "6"))
        assert cluster.decode.engine.requests == []

    async def test_one_token_needs_no_decode_run(self, cluster: Cluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=1)))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "w6 ", (FinishReason.LENGTH, None))
        assert cluster.decode.engine.requests == []

    async def test_an_end_at_the_first_token_does_not_wait_for_the_blocks(self, cluster: Cluster) -> None:
        cluster.prefill.engine.publishes.clear()
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=1)))
        assert answer.token_ids == [6]

    async def test_a_stop_string_across_the_seam_is_seen(self, cluster: Cluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=9, stop=("w6 w7",))))
        assert (answer.token_ids, answer.text, answer.end) == ([6, 7], "", (FinishReason.STOP, "w6 w7"))

    async def test_a_stop_string_in_the_first_token_ends_it_without_a_decode_run(self, cluster: Cluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=9, stop=("6",))))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "w", (FinishReason.STOP, "6"))
        assert cluster.decode.engine.requests == []

    @pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
    async def test_min_tokens_count_across_the_seam(self, cluster: Cluster, min_tokens: int) -> None:
        for worker in cluster.workers:
            worker.engine.eos_after = 0
        sampling = Sampling(max_tokens=9, min_tokens=min_tokens)
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling))
        assert answer.token_ids == [*[6, 7, 8, 9][:min_tokens], EOS]
        assert answer.end == (FinishReason.STOP, None)

    @pytest.mark.parametrize("prefills", [0, 1])
    async def test_every_token_has_its_logprobs(self, cluster: Cluster, prefills: int) -> None:
        planned = [cluster.prefill.planned][:prefills]
        answer = await cluster.run(cluster.message(*planned, sampling=Sampling(max_tokens=3, logprobs=0)))
        assert [chunk.logprobs for chunk in answer.chunks] == [(logprobs_of(token_id),) for token_id in (6, 7, 8)]

    async def test_several_tokens_of_one_step_travel_together(self, cluster: Cluster) -> None:
        cluster.decode.engine.tokens_per_output = 2
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=6)))
        assert [chunk.token_ids for chunk in answer.chunks] == [(6,), (7, 8), (9, 10), (11,)]

    @pytest.mark.parametrize(
        ("sampling", "reason"),
        [
            (Sampling(max_tokens=2, n=2), "n"),
            (Sampling(max_tokens=2, seed=1), "seed"),
            (Sampling(max_tokens=2, frequency_penalty=0.5), "penalties"),
            (Sampling(max_tokens=2, structured_output=StructuredOutput(kind=StructuredKind.REGEX, value=("a*",))), "structured_output"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_what_cannot_be_handed_off_exactly_stays_on_one_worker(self, cluster: Cluster, sampling: Sampling, reason: str) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling))
        assert cluster.prefill.engine.requests == []
        for choice in range(sampling.n):
            assert [token for chunk in answer.chunks if chunk.choice_index == choice for token in chunk.token_ids] == [6, 7]
        assert answer.receipt is not None
        assert (answer.receipt.one_worker_reason, answer.receipt.handed_off) == (reason, False)


class TestResume:
    @pytest.mark.parametrize("prefills", [0, 1])
    async def test_positions_and_text_go_on_after_the_resumed_tokens(self, cluster: Cluster, prefills: int) -> None:
        planned = [cluster.prefill.planned][:prefills]
        answer = await cluster.run(cluster.message(*planned, sampling=Sampling(max_tokens=5), resume=(6, 7)))
        assert [chunk.first_position for chunk in answer.chunks] == [2, 3, 4]
        assert (answer.token_ids, answer.text, answer.end) == ([8, 9, 10], "w8 w9 w10 ", (FinishReason.LENGTH, None))
        assert answer.chunks[-1].usage == Usage(prompt_tokens=5, output_tokens=5, cached_tokens=0)

    async def test_a_stop_string_may_begin_in_the_resumed_tokens(self, cluster: Cluster) -> None:
        sampling = Sampling(max_tokens=9, stop=("7 w8",))
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling, resume=(6, 7)))
        # "w6 " has left with the resumed tokens, of "w7 w8 " only what stands before the stop string may.
        assert (answer.token_ids, answer.text, answer.end) == ([8], "w", (FinishReason.STOP, "7 w8"))

    @pytest.mark.parametrize("prefills", [0, 1])
    @pytest.mark.parametrize("resume", [(6,), (6, 7), (6, 7, 8)])
    async def test_min_tokens_count_the_resumed_ones(self, cluster: Cluster, resume: tuple[int, ...], prefills: int) -> None:
        for worker in cluster.workers:
            worker.engine.eos_after = 0
        message = cluster.message(*[cluster.prefill.planned][:prefills], sampling=Sampling(max_tokens=9, min_tokens=2), resume=resume)
        assert [*resume, *(await cluster.run(message)).token_ids] == [*([6, 7, 8][: max(2, len(resume))]), EOS]

    async def test_resumed_tokens_that_hold_a_stop_string_leave_nothing_to_do(self, cluster: Cluster) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await cluster.run(cluster.message(sampling=Sampling(max_tokens=9, stop=("w7",)), resume=(6, 7, 8)))
        assert caught.value.field == "resume_token_ids"


class TestLostPrefillWorkers:
    async def closed(self, cluster: Cluster) -> PlannedWorker:
        await cluster.second.die()
        return cluster.second.planned

    async def test_the_next_of_the_plan_replaces_one_that_is_down(self, cluster: Cluster) -> None:
        answer = await cluster.run(cluster.message(await self.closed(cluster), cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert answer.receipt.prefill_replica_id == "prefill-0"

    async def test_the_decode_worker_does_it_where_all_are_down(self, cluster: Cluster) -> None:
        message = cluster.message(await self.closed(cluster), await self.closed(cluster))
        cluster.decode.engine.gate.clear()
        running = asyncio.create_task(cluster.run(message))
        await has_run(cluster.decode)
        assert cluster.decode.state.pending_prefill_tokens == PROMPT_TOKENS
        cluster.decode.engine.gate.set()
        answer = await running
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert (answer.receipt.one_worker_reason, answer.receipt.handed_off) == ("prefill_lost", False)
        assert answer.receipt.prefill_replica_id == "decode-0"

    @pytest.mark.parametrize("error", [EngineError("broken"), OverloadedError("full", retry_after_s=1.0)], ids=["engine", "full"])
    async def test_one_that_fails_is_replaced(self, cluster: Cluster, error: TandemError) -> None:
        cluster.second.engine.error = error
        answer = await cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]

    async def test_one_whose_engine_gives_up_is_replaced(self, cluster: Cluster) -> None:
        cluster.second.engine.abort_reason = FinishReason.ERROR
        answer = await cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]

    async def test_one_that_dies_before_its_token_is_replaced(self, cluster: Cluster) -> None:
        cluster.second.engine.gate.clear()
        running = asyncio.create_task(cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned)))
        await has_run(cluster.second)
        await cluster.second.die()
        assert (await running).token_ids == [6, 7, 8, 9]

    async def test_one_that_dies_after_its_token_is_not_missed(self, cluster: Cluster) -> None:
        cluster.prefill.engine.publishes.clear()
        async with cluster.open(cluster.message(cluster.prefill.planned)) as stream:
            chunks = [await first_chunk(stream)]
            await cluster.prefill.die()
            while (chunk := await read(stream)) is not None:
                chunks.append(chunk)
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [6, 7, 8, 9]

    async def test_one_that_falls_silent_after_its_token_is_not_waited_for(self, cluster: Cluster) -> None:
        cluster.prefill.engine.publishes.clear()
        assert (await cluster.run(cluster.message(cluster.prefill.planned))).token_ids == [6, 7, 8, 9]

    @pytest.mark.parametrize("error", [EngineError("broken"), InternalError("a bug")], ids=["engine", "bug"])
    async def test_a_failure_after_its_token_is_not_the_requests(self, cluster: Cluster, error: TandemError) -> None:
        cluster.prefill.engine.publish_error = error
        answer = await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert cluster.second.engine.requests == []

    async def test_what_it_says_of_the_request_itself_is_passed_on(self, cluster: Cluster) -> None:
        cluster.prefill.engine.error = InvalidRequestError("sampling.regex", "does not compile")
        with pytest.raises(InvalidRequestError, match="does not compile") as caught:
            await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
        assert caught.value.field == "sampling.regex"
        assert cluster.second.engine.requests == cluster.decode.engine.requests == []

    async def test_one_that_takes_no_work_is_replaced(self, cluster: Cluster) -> None:
        cluster.second.state.drain()
        stale = replace(cluster.prefill.planned, incarnation=INCARNATION - 1)
        answer = await cluster.run(cluster.message(stale, cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert answer.receipt.prefill_replica_id == "prefill-0"

    @pytest.mark.parametrize("says", ["garbage", "nothing", "published first", "cancelled"])
    async def test_one_that_breaks_the_protocol_is_replaced(self, cluster: Cluster, says: str) -> None:
        class Odd:
            async def prefill(self, request: worker_pb2.PrefillRequest, its_call: ServerCall) -> None:
                match says:
                    case "garbage":
                        await its_call.write(b"\xff\xff")
                    case "published first":
                        await its_call.write(worker_pb2.PrefillResponse(published=worker_pb2.Published(published_blocks=1)))
                    case "cancelled":
                        raise CancelledRequestError

            async def refuse(self, request: object, its_call: ServerCall) -> None:
                raise AssertionError

            generate = watch = drain = refuse

        server = await start_server("127.0.0.1", 0, {"tandem.v1.Worker": service(worker_pb2, "Worker", Odd())})
        odd = PlannedWorker(replica_id=ReplicaId("odd"), incarnation=0, address=server.address)
        answer = await cluster.run(cluster.message(odd, cluster.prefill.planned))
        await server.stop(0.0)
        assert answer.token_ids == [6, 7, 8, 9]


class TestEnds:
    @pytest.mark.parametrize("stage", ["prefill", "between", "decode", "alone"])
    async def test_a_client_that_goes_frees_all_at_any_stage(self, cluster: Cluster, stage: str) -> None:
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

    async def test_a_deadline_that_passes_frees_all(self, cluster: Cluster) -> None:
        cluster.prefill.engine.gate.clear()
        with pytest.raises(DeadlineError):
            await cluster.run(cluster.message(cluster.prefill.planned), timeout_s=0.2)
        await cluster.settle()

    async def test_a_deadline_that_has_passed_is_told_with_its_stage(self, cluster: Cluster) -> None:
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

    async def test_an_engine_that_fails_midway_is_an_error_that_can_be_retried(self, cluster: Cluster) -> None:
        cluster.decode.engine.abort_reason = FinishReason.ERROR
        answer = Answer()
        with pytest.raises(EngineError) as caught:
            await cluster.run(cluster.message(cluster.prefill.planned), answer=answer)
        assert caught.value.retryable
        assert answer.token_ids == [6]

    async def test_a_worker_that_dies_is_an_error_that_can_be_retried(self, cluster: Cluster) -> None:
        cluster.decode.engine.gate.clear()
        answer = Answer()
        running = asyncio.create_task(cluster.run(cluster.message(cluster.prefill.planned), answer=answer))
        await has_run(cluster.decode)
        await cluster.decode.die()
        with pytest.raises(TandemError) as caught:
            await running
        assert answer.token_ids == [6]
        assert (caught.value.retryable, caught.value.reason) == (True, Reason.WORKER_LOST)

    @pytest.mark.parametrize("incarnation", [INCARNATION - 1, INCARNATION + 1])
    async def test_work_for_another_incarnation_is_refused(self, cluster: Cluster, incarnation: int) -> None:
        with pytest.raises(UnavailableError) as caught:
            await cluster.run(cluster.message(incarnation=incarnation))
        assert (caught.value.reason, caught.value.retryable) == (Reason.STALE_INCARNATION, True)

    async def test_a_draining_worker_ends_what_it_has_and_takes_no_more(self, cluster: Cluster) -> None:
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

    async def test_the_same_attempt_twice_at_once_is_served_twice(self, cluster: Cluster) -> None:
        message = cluster.message(cluster.prefill.planned)
        cluster.prefill.engine.publishes.clear()
        cluster.decode.engine.gate.clear()
        running = [asyncio.create_task(cluster.run(message)) for _ in range(3)]
        await cluster.until(lambda: len(cluster.prefill.engine.requests) == 3)
        cluster.prefill.engine.publishes.set()
        await cluster.until(lambda: len(cluster.decode.engine.requests) == 3)
        cluster.decode.engine.gate.set()
        assert [(await one).token_ids for one in running] == [[6, 7, 8, 9]] * 3

    async def test_a_request_beyond_the_engines_limits_is_refused_by_name(self, cluster: Cluster) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await cluster.run(cluster.message(sampling=Sampling(max_tokens=65)))
        assert caught.value.field == "sampling.max_tokens"


class TestReceipt:
    async def test_a_hand_off_is_accounted_for(self, cluster: Cluster) -> None:
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

    async def test_one_worker_is_accounted_for(self, cluster: Cluster) -> None:
        cluster.decode.engine.cached_tokens = 4
        answer = await cluster.run(cluster.message(one_worker_reason="short"))
        receipt = answer.receipt
        assert receipt is not None
        assert (receipt.handed_off, receipt.one_worker_reason) == (False, "short")
        assert (receipt.prefill_replica_id, receipt.decode_replica_id) == ("decode-0", "decode-0")
        assert (receipt.cached_tokens, receipt.decode_recomputed_tokens, receipt.kv_bytes_shipped) == (4, 1, 0)
        assert (receipt.handoff_gap_s, receipt.transfer_s) == (0.0, 0.0)
        assert 0.0 < receipt.prefill_s <= receipt.e2e_s

    async def test_an_end_at_the_first_token_is_no_hand_off(self, cluster: Cluster) -> None:
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

    async def test_the_lease_comes_first_and_then_load(self, cluster: Cluster) -> None:
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

    async def test_the_lease_comes_again_when_it_changes(self, cluster: Cluster) -> None:
        async with self.watching(cluster.decode) as watching:
            await watching.read()
            cluster.decode.state.drain()
            while not (message := await watching.read()).HasField("lease"):
                pass
            assert lease_from_pb(message.lease).state is ReplicaState.DRAINING

    async def test_a_request_is_stamped_on_both_workers_with_the_routers_attempt(self, cluster: Cluster) -> None:
        accepted, finished = worker_pb2.RequestStamp.KIND_ACCEPTED, worker_pb2.RequestStamp.KIND_FINISHED
        async with self.watching(cluster.prefill) as prefill, self.watching(cluster.decode) as decode:
            for watching in (prefill, decode):
                await watching.read()  # from here on the worker knows of the stream
            await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
            for watching in (prefill, decode):
                assert await watching.stamps(2) == [("r", 1, accepted), ("r", 1, finished)]

    async def test_a_router_is_told_of_its_own_requests_only(self, cluster: Cluster) -> None:
        async with self.watching(cluster.decode, "router-2") as watching:
            await watching.read()
            await cluster.run(cluster.message())
            for _ in range(3):
                assert not (await watching.read()).stamps

    async def test_load_counts_what_runs(self, cluster: Cluster) -> None:
        cluster.decode.engine.gate.clear()
        async with self.watching(cluster.decode) as watching, cluster.open(cluster.message()) as stream:
            while (message := await watching.read()).load.running_requests == 0:
                pass
            assert (message.load.pending_prefill_tokens, message.load.kv_tokens) == (PROMPT_TOKENS, PROMPT_TOKENS)
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
