"""The caller's side of a hand-off: one token from the first prefill worker that gives one."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import grpc.aio

from tandem.convert import finish_reason_from_pb, logprobs_from_pb, sampling_to_pb
from tandem.domain import Namespace, Plan, PlannedWorker, Request
from tandem.engine.base import EngineOutput
from tandem.errors import CancelledRequestError, DeadlineError, ProtocolError, Reason, TandemError
from tandem.rpc import Deadline, ResponseStream, open_stream, parse_answer
from tandem.session import has_lost_worker
from tandem.v1 import worker_pb2

logger = logging.getLogger(__name__)

Channels = Callable[[str], grpc.aio.Channel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilling:
    """This worker is asked now: its node's store will hold the prompt's blocks, chunk by chunk."""

    worker: PlannedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The first token, by whom, and what it took: seconds and prompt tokens that were cached there."""

    worker: PlannedWorker
    output: EngineOutput
    prefill_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The prompt's leading blocks that are in the store now."""

    blocks: int


async def prefill_elsewhere(
    request: Request, plan: Plan, attempt: int, deadline: Deadline, channels: Channels, *, namespace: Namespace, publish_wait_s: float
) -> AsyncGenerator[Prefilling | Prefilled | Published, None]:
    """Yields Prefilling for each worker that is tried, Prefilled at once, then Published; no more where all of the plan are lost.

    One whose blocks are of another `namespace` (model, revision, type) is lost too.

    A worker lost after its token, or silent for `publish_wait_s` after it, is not replaced: what it had published is loaded, the rest
    computed. Raises DeadlineError, and what a worker says of the request itself (bad input).
    """
    for worker in plan.prefill:
        message = _to_pb(request, plan, worker, attempt, namespace)
        has_token = False
        yield Prefilling(worker=worker)
        try:
            async with open_stream(
                channels(worker.address), "tandem.v1.Worker/Prefill", message, timeout_s=deadline.remaining_s("prefill")
            ) as stream:
                yield _prefilled(worker, await _read(stream))
                has_token = True
                async with asyncio.timeout(publish_wait_s):
                    published = (await _read(stream)).published
                yield Published(blocks=published.published_blocks)
                return
        except (TandemError, TimeoutError) as error:
            if not (has_token or _is_loss(error)) or isinstance(error, DeadlineError):
                raise
            logger.warning("prefill_lost request_id=%s replica_id=%s error=%r", request.request_id, worker.replica_id, error)
            if has_token:
                return


def _is_loss(error: Exception) -> bool:
    """Whether the worker failed and not the request; a worker that stops cancels its calls, and only the client may cancel the request.

    The reason PROTOCOL is that of a status that no worker of ours gave: its port is somebody else's now.
    """
    if not isinstance(error, TandemError):
        return False
    return isinstance(error, CancelledRequestError) or error.reason is Reason.PROTOCOL or has_lost_worker(error)


async def _read(stream: ResponseStream) -> worker_pb2.PrefillResponse:
    payload = await stream.read()
    if payload is None:
        raise ProtocolError("the prefill worker ended its stream early")
    return parse_answer(worker_pb2.PrefillResponse, payload)


def _prefilled(worker: PlannedWorker, response: worker_pb2.PrefillResponse) -> Prefilled:
    if not response.HasField("first_token"):
        raise ProtocolError("the prefill worker's first message holds no token")
    first = response.first_token
    output = EngineOutput(
        choice_index=0,
        token_ids=(first.token_id,),
        logprobs=(logprobs_from_pb(first.logprobs),) if first.HasField("logprobs") else (),
        finish_reason=finish_reason_from_pb(first.finish_reason),
        stop_reason=first.stop_reason or None,
        cached_tokens=first.cached_tokens,
    )
    return Prefilled(
        worker=worker,
        output=output,
        prefill_s=first.prefill_s,
        cached_tokens=first.cached_tokens,
    )


def _to_pb(request: Request, plan: Plan, worker: PlannedWorker, attempt: int, namespace: Namespace) -> worker_pb2.PrefillRequest:
    return worker_pb2.PrefillRequest(
        request_id=request.request_id,
        attempt=attempt,
        model=request.model,
        prompt_token_ids=[*request.prompt_token_ids, *request.resume_token_ids],
        resumed_tokens=len(request.resume_token_ids),
        sampling=sampling_to_pb(request.sampling),
        priority=request.priority,
        slack_s=plan.slack_s,
        prefill_tokens=plan.prefill_tokens,
        cache_salt=request.cache_salt,
        replica_id=worker.replica_id,
        incarnation=worker.incarnation,
        namespace=namespace,
        router_id=plan.router_id,
    )
