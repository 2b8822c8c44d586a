"""The router's shell against fake workers over real gRPC: cancels, deadlines, refusals."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tandem import rpc
from tandem.errors import Code, Reason, TandemError
from tandem.v1 import common_pb2, inference_pb2
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.router_shell import (
    CONFIG,
    GENERATE,
    Output,
    Router,
    eventually,
    expected,
    message,
    refused,
    sample_request,
    serve_router,
)

pytestmark = pytest.mark.integration


async def _cancel_when(router: Router, is_there: Callable[[], bool], request: inference_pb2.GenerateRequest) -> None:
    call = asyncio.create_task(router.generate(request))
    await eventually(is_there)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await router.becomes_idle()


@pytest.mark.parametrize("hang_at", [0, 4])
async def test_a_cancel_frees_router_and_worker(hang_at: int) -> None:
    async with serve_workers(decode_0=Faults(hang_at=hang_at)) as workers, serve_router(workers) as router:
        worker = workers["decode_0"]
        await _cancel_when(router, worker.hangs.is_set, message())
        await asyncio.wait_for(worker.was_cancelled.wait(), 5)
        assert worker.state.running_requests == 0
        assert router.metric("tandem_router_requests_total", model="m", outcome="client_cancelled") == 1


async def test_a_cancel_in_the_queue_frees_the_place() -> None:
    config = replace(CONFIG, max_running_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        first = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        second = asyncio.create_task(router.generate(message()))
        await eventually(lambda: router.shell.core.queued_requests == 1)
        second.cancel()
        await eventually(lambda: router.shell.core.queued_requests == 0)
        assert len(workers["decode_0"].requests) == 1
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await router.becomes_idle()


async def test_a_cancel_while_waiting_for_the_first_worker_frees_the_call() -> None:
    config = replace(CONFIG, no_replica_wait_s=60.0)
    async with serve_router({}, config) as router:
        await _cancel_when(router, lambda: router.shell._calls.total() == 1, message())


async def test_the_deadline_ends_a_stream_that_hangs() -> None:
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers) as router:
        error = await refused(router, message(), timeout_s=0.5)
        assert error.code is Code.DEADLINE_EXCEEDED
        await asyncio.wait_for(workers["decode_0"].was_cancelled.wait(), 5)


async def test_the_deadline_ends_a_wait_in_the_queue() -> None:
    config = replace(CONFIG, max_running_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        first = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(), timeout_s=0.3)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        assert len(workers["decode_0"].requests) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await router.becomes_idle()


async def test_a_deadline_that_has_passed_dispatches_nothing() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, message(), timeout_s=0.0)
        assert error.code is Code.DEADLINE_EXCEEDED
        assert workers["decode_0"].requests == []


async def test_without_any_worker_the_router_answers_unavailable_in_time() -> None:
    async with serve_router({}) as router:
        error = await refused(router, message())
        assert (error.reason, error.retryable) == (Reason.NO_REPLICA, True)


async def test_the_first_worker_is_waited_for() -> None:
    async with serve_workers(decode_0=Faults()) as workers:
        config = replace(CONFIG, no_replica_wait_s=10.0)
        async with serve_router(workers, config, is_waiting=False) as router:
            assert (await router.generate(message())).tokens == {0: expected(sample_request())}


async def test_a_model_without_replicas_is_unavailable_after_a_wait() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        await workers["decode_0"].stop()
        error = await refused(router, message())
        assert error.reason is Reason.NO_REPLICA


async def test_an_unknown_model_is_refused_with_the_names() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, message(model="gpt-17"))
        assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.UNKNOWN_MODEL)
        assert "served are: m" in error.message
        assert (await router.generate(message(model=""))).tokens
        assert router.metric("tandem_router_requests_total", model="unknown", outcome="unknown_model") == 1


BAD_REQUESTS = {
    "bad token id": (message(token_ids=inference_pb2.TokenIds(ids=[1, 2048])), "prompt.token_ids"),
    "no prompt": (inference_pb2.GenerateRequest(model="m"), "prompt"),
    "empty token ids": (message(prompt_tokens=0), "prompt"),
    "empty text": (inference_pb2.GenerateRequest(model="m", text=""), "prompt"),
    "empty chat": (inference_pb2.GenerateRequest(model="m", chat=inference_pb2.ChatMessages()), "prompt"),
    "too long": (message(prompt_tokens=1024), "prompt"),
    "bad first position": (message(first_position=1), "first_position"),
    "bad resumed id": (message(resume_token_ids=[5000], first_position=1), "resume_token_ids"),
    "several resumed": (
        message(resume_token_ids=[5], first_position=1, sampling=common_pb2.Sampling(max_tokens=8, n=2)),
        "resume_token_ids",
    ),
    "bad sampling": (message(sampling=common_pb2.Sampling(temperature=-1.0)), "sampling.temperature"),
    "long id": (message(request_id="x" * 129), "request_id"),
    "odd id": (message(request_id="a\nb"), "request_id"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_is_refused_by_field(name: str) -> None:
    request, field = BAD_REQUESTS[name]
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, request)
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, field)
        assert workers["decode_0"].requests == []


async def test_text_for_a_model_without_tokenizer_says_what_to_send() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, inference_pb2.GenerateRequest(model="m", text="hello"))
        assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BAD_MODEL)


async def test_an_id_in_use_is_refused_and_its_owner_served() -> None:
    faults = Faults(hang_at=4)
    async with serve_workers(decode_0=faults) as workers, serve_router(workers) as router:
        output = Output()
        first = asyncio.create_task(router.generate(message(request_id="mine"), into=output))
        await workers["decode_0"].hangs.wait()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(request_id="mine"))
        assert caught.value.field == "request_id"
        assert router.shell.core.running_requests == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await router.becomes_idle()
        faults.hang_at = None
        assert (await router.generate(message(request_id="mine"))).tokens == {0: expected(sample_request())}
        assert [sent.request_id for sent in workers["decode_0"].requests] == ["mine", "mine"]


async def test_bytes_that_are_no_message_arerefused() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        invalid_utf8 = b"\x12\x02\xff\xfe"  # field 2, model
        with pytest.raises(TandemError) as caught:
            async with rpc.open_stream(router.channel, GENERATE, invalid_utf8, timeout_s=10) as stream:
                await stream.read()
        assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.BAD_BYTES)


async def test_a_message_of_100_mb_is_refused_and_the_router_lives() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, inference_pb2.GenerateRequest(model="m", text="x" * 100_000_000))
        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.MESSAGE_TOO_LARGE)
        assert (await router.generate(message())).tokens == {0: expected(sample_request())}


async def test_a_full_queue_says_when_to_come_back() -> None:
    config = replace(CONFIG, max_running_requests=1, max_queued_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        calls = [asyncio.create_task(router.generate(message())) for _ in range(2)]
        await eventually(lambda: router.shell.core.queued_requests == 1)
        stub = router.channel.unary_stream(f"/{GENERATE}", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub(message().SerializeToString())))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = cast("Iterable[tuple[str, bytes]]", caught.value.trailing_metadata() or ())
        details = status_pb2.Status.FromString(dict(trailing)["grpc-status-details-bin"]).details
        (retry,) = [detail for detail in details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
        assert error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.ToNanoseconds() > 0
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await router.becomes_idle()
