"""Two prefill workers and a decode worker over real gRPC on loopback, with engines of a few lines: token n is followed by n + 1."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from decode_workers.service import DecodeService
from prefill_workers.service import PrefillService
from tandem.channel_pool import ChannelPool
from tandem.convert import chunk_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.domain import Chunk, FinishReason, Plan, PlannedWorker, Receipt, Role, Sampling
from tandem.faults import Faults
from tandem.replica import WorkerService
from tandem.rpc import ResponseStream, Server, open_stream, parse_answer, service, start_server
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tandem.worker_state import WorkerState
from tests.fake_engine import INFO, FakeEngine
from tests.samples import make_lease, make_request

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


class FakeCluster:
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


@asynccontextmanager
async def running_cluster() -> AsyncIterator[FakeCluster]:
    """At the end nothing may be held by anyone, whatever was done."""
    channels = ChannelPool()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(channels.close)
        made = FakeCluster(channels)
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
