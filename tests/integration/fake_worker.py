"""A Worker service on loopback without an engine: its tokens are a function of prompt and position, its faults are switches."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from tandem import convert, rpc
from tandem.domain import Chunk, FinishReason, Lease, Receipt, Request, Role, Usage
from tandem.errors import EngineError, NotBuiltError, TandemError
from tandem.v1 import worker_pb2
from tandem.worker_state import StampKind, WorkerState
from tests.samples import make_lease

_KINDS = {StampKind.ACCEPTED: worker_pb2.RequestStamp.KIND_ACCEPTED, StampKind.FINISHED: worker_pb2.RequestStamp.KIND_FINISHED}
WATCH_INTERVAL_S = 0.02


def expected_token(request: Request, position: int, choice: int = 0) -> int:
    """What every worker computes at this position, whoever came before."""
    return (sum(request.prompt_token_ids) * 31 + position * 7 + choice) % 2000 + 1


@dataclass
class Faults:
    """What goes wrong; positions count output tokens."""

    error_at: int | None = None  # raises `error` instead of the token at this position
    error: TandemError | None = None
    hang_at: int | None = None  # stops sending, still connected
    skip_at: int | None = None  # leaves this position out
    break_off_at: int | None = None  # sends finish reason ERROR there
    is_receipt_lost: bool = False  # fails after the finish reason
    is_end_lost: bool = False  # fails after the last token, before the finish reason
    is_watch_silent: bool = False
    has_no_receipt: bool = False
    coalesced_tokens: int = 1
    text: str = ""  # of each message


class FakeWorker:
    """One replica. `prefill` is never called: the fake computes all by itself, as a worker may."""

    def __init__(self, lease: Lease, faults: Faults | None = None) -> None:
        self.state = WorkerState(lease)
        self.faults = Faults() if faults is None else faults
        self.requests: list[worker_pb2.WorkerGenerateRequest] = []
        self.time_remaining_s: float | None = None
        self.token_delay_s = 0.0
        self.written_bytes = Counter[str]()  # by request
        self.hangs = asyncio.Event()
        self.was_cancelled = asyncio.Event()
        self.server: rpc.Server | None = None

    async def generate(self, message: worker_pb2.WorkerGenerateRequest, call: rpc.ServerCall) -> None:
        self.requests.append(message)
        self.time_remaining_s = call.time_remaining_s()
        self.state.check(message.model, message.incarnation)
        request, plan = convert.request_from_worker_pb(message), convert.plan_from_pb(message.plan)
        request.validate(self.state.lease.engine)
        tokens = request.total_tokens
        with self.state.accept(plan.router_id, request.request_id, message.attempt, prefill_tokens=tokens, kv_tokens=tokens) as run:
            try:
                await self._stream(request, call)
            except asyncio.CancelledError:
                self.was_cancelled.set()
                raise
            self.state.prefilled(run)
            if not self.faults.has_no_receipt:
                name = self.state.lease.replica_id
                receipt = Receipt(request_id=request.request_id, prefill_s=0.001, prompt_tokens=tokens, decode_replica_id=name)
                call.set_receipt(convert.receipt_to_pb(receipt))

    async def _stream(self, request: Request, call: rpc.ServerCall) -> None:
        limit, faults = request.max_output_tokens(self.state.lease.engine), self.faults
        position = len(request.resume_token_ids)
        while position < limit:
            if position == faults.hang_at:
                self.hangs.set()
                await asyncio.sleep(3600)
            if position == faults.error_at:
                raise faults.error or EngineError("the engine died")
            if position == faults.break_off_at:
                await call.write(convert.chunk_to_pb(Chunk(first_position=position, finish_reason=FinishReason.ERROR)))
                return
            position += position == faults.skip_at
            count = min(faults.coalesced_tokens, limit - position)
            is_last = position + count == limit and not faults.is_end_lost
            seed = request.sampling.seed or 0  # a router asks for each choice by itself, with its seed
            for choice in range(seed, seed + request.sampling.n):
                chunk = Chunk(
                    first_position=position,
                    token_ids=tuple(expected_token(request, position + index, choice) for index in range(count)),
                    text=faults.text,
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    usage=Usage(prompt_tokens=request.total_tokens, output_tokens=limit, cached_tokens=0) if is_last else None,
                    choice_index=choice - seed,
                )
                payload = convert.chunk_to_pb(chunk).SerializeToString()
                await call.write(payload)
                self.written_bytes[request.request_id] += len(payload)
            position += count
            await asyncio.sleep(self.token_delay_s)
        if faults.is_end_lost or faults.is_receipt_lost:
            raise EngineError("the engine died after its last token")

    async def prefill(self, message: worker_pb2.PrefillRequest, call: rpc.ServerCall) -> None:
        raise NotBuiltError("Worker.Prefill")

    async def drain(self, message: worker_pb2.DrainRequest, call: rpc.ServerCall) -> worker_pb2.DrainResponse:
        self.state.drain()
        return worker_pb2.DrainResponse()

    async def watch(self, request: worker_pb2.WatchRequest, call: rpc.ServerCall) -> None:
        sequence, lease = 0, None
        with self.state.watch(request.router_id) as watcher:
            while True:
                stamps = await watcher.changed(WATCH_INTERVAL_S)
                if self.faults.is_watch_silent:
                    await asyncio.sleep(3600)
                message = worker_pb2.WatchResponse(
                    incarnation=self.state.lease.incarnation,
                    sequence=sequence,
                    lease=convert.lease_to_pb(self.state.lease) if lease is not self.state.lease else None,
                    load=worker_pb2.WorkerLoad(
                        running_requests=self.state.running_requests,
                        pending_prefill_tokens=self.state.pending_prefill_tokens,
                        kv_tokens=self.state.kv_tokens,
                    ),
                    stamps=[
                        worker_pb2.RequestStamp(request_id=stamp.request_id, attempt=stamp.attempt, kind=_KINDS[stamp.kind])
                        for stamp in stamps
                    ],
                )
                lease = self.state.lease
                sequence += 1
                await call.write(message)

    async def start(self, port: int = 0) -> None:
        """Listens; its lease says where."""
        self.server = await rpc.start_server("127.0.0.1", port, {"tandem.v1.Worker": rpc.service(worker_pb2, "Worker", self)})
        self.state.lease = replace(self.state.lease, address=self.server.address)

    async def stop(self) -> None:
        """Cuts every stream, as a killed process does."""
        if self.server is not None:
            await self.server.stop(0.0)


@asynccontextmanager
async def serve_workers(**faults: Faults) -> AsyncIterator[dict[str, FakeWorker]]:
    """One fake per keyword, named like "prefill_0" or "decode_1"."""
    workers = {name: FakeWorker(make_lease(name, Role(name.split("_")[0])), fault) for name, fault in faults.items()}
    for worker in workers.values():
        await worker.start()
    try:
        yield workers
    finally:
        for worker in workers.values():
            await worker.stop()
