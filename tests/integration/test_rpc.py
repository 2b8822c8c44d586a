"""Every error over a real loopback call, as a single answer and in a stream, on both kinds of channel."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tandem import rpc, rpc_sync
from tandem.errors import Code, DeadlineError, InternalError, InvalidRequestError, MessageTooLargeError, Reason, TandemError
from tandem.v1 import common_pb2, inference_pb2
from tests.unit.test_rpc_status import ERRORS, seen

pytestmark = pytest.mark.integration

GENERATE = "tandem.v1.Inference/Generate"
LIST_MODELS = "tandem.v1.Inference/ListModels"


class Failing:
    """Raises what it is told to; a stream sends one message and the receipt first."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    async def generate(self, request: inference_pb2.GenerateRequest, call: rpc.ServerCall) -> None:
        await call.write(inference_pb2.GenerateResponse(text="first"))
        call.set_receipt(common_pb2.Receipt(request_id="r"))
        if self.error is not None:
            raise self.error

    async def list_models(self, request: inference_pb2.ListModelsRequest, call: rpc.ServerCall) -> inference_pb2.ListModelsResponse:
        if self.error is not None:
            raise self.error
        return inference_pb2.ListModelsResponse()


@pytest.fixture
async def failing() -> Failing:
    return Failing()


@pytest.fixture
async def address(failing: Failing) -> AsyncIterator[str]:
    server = await rpc.start_server("127.0.0.1", 0, {"tandem.v1.Inference": rpc.service(inference_pb2, "Inference", failing)})
    yield server.address
    await server.stop(grace_s=0.0)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = rpc.open_channel(address)
    yield channel
    await channel.close(None)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error.reason}")
async def test_every_error_comes_back_from_every_kind_of_call(
    failing: Failing, address: str, channel: grpc.aio.Channel, error: TandemError
) -> None:
    failing.error = error
    with pytest.raises(TandemError) as caught:
        await rpc.call(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=30)
    assert seen(caught.value) == seen(error)

    async with rpc.open_stream(channel, GENERATE, inference_pb2.GenerateRequest(), timeout_s=30) as stream:
        assert inference_pb2.GenerateResponse.FromString(await stream.read() or b"").text == "first"
        with pytest.raises(TandemError) as caught:
            await stream.read()
    assert seen(caught.value) == seen(error)

    for blocking in (call_blocking, stream_blocking):
        with pytest.raises(TandemError) as caught:
            await asyncio.to_thread(blocking, address)
        assert seen(caught.value) == seen(error)


def call_blocking(address: str) -> None:
    with rpc.open_sync_client_channel(address) as channel:
        rpc_sync.call_sync(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=30)


def stream_blocking(address: str) -> None:
    with rpc.open_sync_client_channel(address) as channel:
        stream = rpc_sync.start_stream_sync(channel, GENERATE, inference_pb2.GenerateRequest(), timeout_s=30)
        while stream.read() is not None:
            pass


@pytest.mark.parametrize("code", list(Code))
async def test_any_client_can_read_status_and_details(failing: Failing, channel: grpc.aio.Channel, code: Code) -> None:
    failing.error = TandemError("what to do", code=code, reason=Reason.NO_REPLICA, retryable=True, field="model", retry_after_s=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"/{LIST_MODELS}", None, None)(b"")
    assert caught.value.code().name == code.name
    assert caught.value.details() == "what to do"
    payload = dict(cast("Iterable[tuple[str, bytes]]", caught.value.trailing_metadata()))["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(payload)
    assert (status.code, status.message) == (caught.value.code().value[0], "what to do")
    info, bad_request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail, message in zip(status.details, (info, bad_request, retry), strict=True):
        assert detail.Unpack(message)
    assert (info.reason, info.domain, dict(info.metadata)) == ("NO_REPLICA", "tandem", {"retryable": "true"})
    assert bad_request.field_violations[0].field == "model"
    assert retry.retry_delay.ToMilliseconds() == 1_500


async def test_a_bug_is_reported_without_its_words(failing: Failing, channel: grpc.aio.Channel) -> None:
    failing.error = ZeroDivisionError("a prompt may stand here")
    with pytest.raises(InternalError) as caught:
        await rpc.call(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=30)
    assert "prompt" not in caught.value.message


async def test_a_server_side_timeout_is_a_deadline(failing: Failing, channel: grpc.aio.Channel) -> None:
    failing.error = TimeoutError()
    with pytest.raises(DeadlineError) as caught:
        await rpc.call(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=30)
    assert caught.value.stage == "server"


async def test_bad_bytes_are_an_invalid_request(channel: grpc.aio.Channel) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        async with rpc.open_stream(channel, GENERATE, b"\xff\xff", timeout_s=30) as stream:
            await stream.read()
    assert caught.value.reason is Reason.BAD_BYTES


async def test_an_error_whose_message_is_huge_still_arrives(failing: Failing, channel: grpc.aio.Channel) -> None:
    failing.error = InvalidRequestError("prompt", "\u732b" * 1_000_000)
    with pytest.raises(InvalidRequestError) as caught:
        await rpc.call(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=30)
    assert caught.value.field == "prompt"


async def test_the_receipt_comes_with_a_good_end_and_none_before(channel: grpc.aio.Channel) -> None:
    async with rpc.open_stream(channel, GENERATE, inference_pb2.GenerateRequest(), timeout_s=30) as stream:
        assert len([message async for message in stream]) == 1
        receipt = await stream.receipt()
    assert common_pb2.Receipt.FromString(receipt or b"").request_id == "r"


async def test_a_message_over_the_limit_is_message_too_large(channel: grpc.aio.Channel) -> None:
    request = inference_pb2.GenerateRequest(text="x" * (rpc.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(MessageTooLargeError):
        async with rpc.open_stream(channel, GENERATE, request, timeout_s=30) as stream:
            await stream.read()


@pytest.mark.parametrize("timeout_s", [1e9, 1e12, 1e300])
async def test_a_deadline_in_ages_is_not_over_at_once(channel: grpc.aio.Channel, timeout_s: float) -> None:
    await rpc.call(channel, LIST_MODELS, inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse, timeout_s=timeout_s)
    async with rpc.open_stream(channel, GENERATE, inference_pb2.GenerateRequest(), timeout_s=timeout_s) as stream:
        assert len([payload async for payload in stream]) == 1
