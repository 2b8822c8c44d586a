"""An Inference and Control service on loopback whose behaviour the request's model name chooses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tandem import convert, rpc
from tandem.domain import (
    Chunk,
    EngineInfo,
    FinishReason,
    Lease,
    Logprobs,
    ModelId,
    Namespace,
    Receipt,
    ReplicaId,
    RequestId,
    Role,
    TokenLogprob,
    Usage,
    WorkerLoad,
)
from tandem.errors import CancelledRequestError, NotFoundError, OverloadedError, Reason
from tandem.v1 import control_pb2, inference_pb2

ENGINE = EngineInfo(
    block_size_tokens=16,
    context_tokens=512,
    vocabulary_tokens=1000,
    kv_blocks=10,
    kv_block_bytes=1024,
    dtype="float32",
    engine="simulated",
    engine_version="1",
    eos_token_ids=(2,),
    max_num_seqs=8,
    max_num_batched_tokens=64,
)


def lease(replica_id: str, role: Role) -> Lease:
    return Lease(
        replica_id=ReplicaId(replica_id),
        incarnation=1,
        node="n0",
        role=role,
        model=ModelId("tiny"),
        model_path="tiny",
        namespace=Namespace("ab"),
        address="127.0.0.1:1",
        engine=ENGINE,
    )


class FakeInference:
    """Says token 100, 101, ... as "t100 ", "t101 ", one chunk each, for `max_tokens` tokens; at `holds_at` it says no more.

    `routers` is what it says of the routers.
    """

    def __init__(self, *, holds_at: int | None = None, routers: str = "") -> None:
        self._holds_at = holds_at
        self._routers = routers
        self.holds = asyncio.Event()
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.time_remaining_s: float | None = None
        self.has_request = asyncio.Event()
        self.was_cancelled = asyncio.Event()

    async def generate(self, request: inference_pb2.GenerateRequest, call: rpc.ServerCall) -> None:
        self.requests.append(request)
        self.has_request.set()
        self.time_remaining_s = call.time_remaining_s()
        try:
            await self._answer(request, call)
        except (asyncio.CancelledError, CancelledRequestError):  # the second: a write found the call over
            self.was_cancelled.set()
            raise

    async def _answer(self, request: inference_pb2.GenerateRequest, call: rpc.ServerCall) -> None:
        match request.model:
            case "unknown":
                raise NotFoundError("no model named unknown", reason=Reason.UNKNOWN_MODEL, field="model")
            case "full":
                raise OverloadedError("the queue is full", retry_after_s=2.5)
            case "bug":
                raise ZeroDivisionError
            case "endless":
                await self._endless(call)
            case "gap":
                await call.write(convert.chunk_to_pb(Chunk(first_position=0, token_ids=(1,))))
                await call.write(convert.chunk_to_pb(Chunk(first_position=2, token_ids=(3,))))
                await self._endless(call)
            case "cut":
                await call.write(convert.chunk_to_pb(Chunk(first_position=0, token_ids=(1,))))
            case "damaged":
                await call.write(b"\xff\xff\xff")
            case _:
                await self._count(request, call)

    async def _count(self, request: inference_pb2.GenerateRequest, call: rpc.ServerCall) -> None:
        sampling = convert.sampling_from_pb(request.sampling)
        await call.tell_routers(self._routers)
        first, limit = request.first_position, sampling.max_tokens or 3
        for position in range(first, limit):
            if position == self._holds_at:
                self.holds.set()
                await asyncio.Event().wait()
            for choice in range(sampling.n):
                token = 100 * (choice + 1) + position
                is_last = position == limit - 1
                logprob = Logprobs(sampled=TokenLogprob(token_id=token, logprob=-0.5, rank=1))
                chunk = Chunk(
                    first_position=position,
                    token_ids=(token,),
                    text=f"t{token} ",
                    logprobs=() if sampling.logprobs is None else (logprob,),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    usage=Usage(prompt_tokens=5, output_tokens=limit, cached_tokens=4) if is_last else None,
                    choice_index=choice,
                )
                await call.write(convert.chunk_to_pb(chunk))
        call.set_receipt(convert.receipt_to_pb(Receipt(request_id=RequestId(request.request_id), ttft_s=0.25, output_tokens=limit)))

    async def _endless(self, call: rpc.ServerCall) -> None:
        for position in range(10**9):
            await call.write(convert.chunk_to_pb(Chunk(first_position=position, token_ids=(7,), text="x")))
            await asyncio.sleep(0.005)

    async def list_models(self, request: inference_pb2.ListModelsRequest, call: rpc.ServerCall) -> inference_pb2.ListModelsResponse:
        model = inference_pb2.Model(id="tiny", context_tokens=512, block_size_tokens=16, prefill_replicas=1, decode_replicas=2)
        return inference_pb2.ListModelsResponse(models=[model])

    async def get_status(self, request: control_pb2.GetStatusRequest, call: rpc.ServerCall) -> control_pb2.GetStatusResponse:
        replicas = [
            control_pb2.ReplicaStatus(
                lease=convert.lease_to_pb(lease(replica_id, role)),
                load=convert.load_to_pb(WorkerLoad(running_requests=2, waiting_requests=1, kv_used_fraction=0.375)),
                is_reachable=replica_id != "d-1",
                predicted_work_s=0.5,
            )
            for replica_id, role in (("p-0", Role.PREFILL), ("d-1", Role.DECODE), ("d-0", Role.DECODE))
        ]
        return control_pb2.GetStatusResponse(cluster="test", router_id="r-0", replicas=replicas, queued_requests=3, running_requests=4)

    async def set_target(self, request: control_pb2.SetTargetRequest, call: rpc.ServerCall) -> control_pb2.SetTargetResponse:
        return control_pb2.SetTargetResponse()

    async def drain_replica(self, request: control_pb2.DrainReplicaRequest, call: rpc.ServerCall) -> control_pb2.DrainReplicaResponse:
        return control_pb2.DrainReplicaResponse()


@asynccontextmanager
async def serve(fake: FakeInference, port: int = 0) -> AsyncIterator[rpc.Server]:
    """The fake on loopback, on a free port unless one is given; running calls are cut at the end."""
    services = {
        "tandem.v1.Inference": rpc.service(inference_pb2, "Inference", fake),
        "tandem.v1.Control": rpc.service(control_pb2, "Control", fake),
    }
    server = await rpc.start_server("127.0.0.1", port, services)
    try:
        yield server
    finally:
        await server.stop(grace_s=0.0)
