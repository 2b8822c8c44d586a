"""Both clients against a real gRPC server on loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from tandem import (
    AsyncClient,
    CancelledRequestError,
    Chunk,
    Client,
    Completion,
    ConfigError,
    DeadlineError,
    FinishReason,
    InternalError,
    InvalidRequestError,
    MessageTooLargeError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    Reason,
    Receipt,
    Slo,
    TandemError,
    UnavailableError,
    Usage,
)
from tandem.domain import Role
from tandem.generate_request import GenerateOptions, Prompt
from tests.integration.fake_inference import FakeInference, serve

pytestmark = pytest.mark.integration
KINDS = pytest.mark.parametrize("kind", ["async", "sync"])


@pytest.fixture
async def fake() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def address(fake: FakeInference) -> AsyncIterator[str]:
    async with serve(fake) as server:
        yield server.address


async def generate(kind: str, address: str, prompt: Prompt, options: GenerateOptions) -> Completion:
    """One request through the client of that kind; the blocking one in a thread."""
    if kind == "async":
        async with AsyncClient(address) as client:
            return await client.generate(prompt, **options)
    with Client(address) as sync_client:
        return await asyncio.to_thread(lambda: sync_client.generate(prompt, **options))


async def stream(kind: str, address: str, prompt: Prompt, options: GenerateOptions) -> tuple[list[Chunk], Receipt | None]:
    """All chunks and the receipt of one request."""
    if kind == "async":
        async with AsyncClient(address) as client, client.stream(prompt, **options) as tokens:
            return [chunk async for chunk in tokens], tokens.receipt

    def run() -> tuple[list[Chunk], Receipt | None]:
        with Client(address) as sync_client, sync_client.stream(prompt, **options) as tokens:
            return list(tokens), tokens.receipt

    return await asyncio.to_thread(run)


@KINDS
async def test_a_stream_yields_every_chunk_in_order_and_then_the_receipt(kind: str, address: str) -> None:
    chunks, receipt = await stream(kind, address, "hello", {"max_tokens": 4, "request_id": "r-1"})
    assert [chunk.token_ids for chunk in chunks] == [(100,), (101,), (102,), (103,)]
    assert [chunk.first_position for chunk in chunks] == [0, 1, 2, 3]
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert receipt is not None
    assert (receipt.request_id, receipt.ttft_s, receipt.output_tokens) == ("r-1", 0.25, 4)


@KINDS
async def test_generate_gives_text_tokens_usage_and_receipt(kind: str, address: str) -> None:
    completion = await generate(kind, address, "hello", {"max_tokens": 3, "logprobs": 0})
    assert completion.text == "t100 t101 t102 "
    assert completion.token_ids == (100, 101, 102)
    assert [entry.sampled.token_id for entry in completion.logprobs] == [100, 101, 102]
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.stop_reason is None
    assert completion.usage == Usage(prompt_tokens=5, output_tokens=3, cached_tokens=4)
    assert completion.receipt is not None


async def test_both_clients_send_the_same_request_and_give_the_same_completion(fake: FakeInference, address: str) -> None:
    options: GenerateOptions = {
        "max_tokens": 9,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": -3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "logit_bias": {3: -1.5},
        "logprobs": 2,
        "n": 2,
        "model": "m",
        "priority": -2,
        "session_id": "s",
        "slo": Slo(ttft_s=0.5),
        "request_id": "r",
        "expected_output_tokens": 8,
    }
    completions = [await generate(kind, address, "hello", options) for kind in ("async", "sync")]
    assert completions[0] == completions[1]
    assert fake.requests[0] == fake.requests[1]
    sent = fake.requests[0]
    assert (sent.priority, sent.session_id, sent.slo.ttft_s, sent.model) == (-2, "s", 0.5, "m")
    assert (sent.sampling.top_k, sent.sampling.seed, list(sent.sampling.stop)) == (7, -3, ["a", "b"])


@KINDS
async def test_several_choices_come_apart_again(kind: str, address: str) -> None:
    completion = await generate(kind, address, "hello", {"max_tokens": 2, "n": 2})
    assert [choice.token_ids for choice in completion.choices] == [(100, 101), (200, 201)]
    assert completion.usage == Usage(prompt_tokens=5, output_tokens=4, cached_tokens=4)


@KINDS
async def test_token_ids_and_chat_arrive_as_what_they_are(kind: str, fake: FakeInference, address: str) -> None:
    await generate(kind, address, [5, 6, 7], {})
    await generate(kind, address, [{"role": "user", "content": "hi"}], {})
    by_ids, by_chat = fake.requests
    assert list(by_ids.token_ids.ids) == [5, 6, 7]
    assert [(message.role, message.content) for message in by_chat.chat.messages] == [("user", "hi")]


@KINDS
async def test_a_resumed_request_goes_on_after_its_tokens(kind: str, fake: FakeInference, address: str) -> None:
    completion = await generate(kind, address, "hello", {"max_tokens": 4, "resume_token_ids": [100, 101]})
    assert completion.token_ids == (102, 103)
    assert fake.requests[0].first_position == 2


@KINDS
async def test_the_deadline_travels_and_ends_the_request(kind: str, fake: FakeInference, address: str) -> None:
    with pytest.raises(DeadlineError):
        await generate(kind, address, "hello", {"model": "endless", "timeout_s": 0.3})
    assert fake.time_remaining_s is not None
    assert 0.0 < fake.time_remaining_s <= 0.3
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)


@KINDS
async def test_without_a_timeout_there_is_no_deadline(kind: str, fake: FakeInference, address: str) -> None:
    await generate(kind, address, "hello", {"timeout_s": None})
    assert fake.time_remaining_s is None


@pytest.mark.parametrize(
    ("model", "kind_of_error", "reason"),
    [
        ("unknown", NotFoundError, Reason.UNKNOWN_MODEL),
        ("full", OverloadedError, Reason.QUEUE_FULL),
        ("bug", InternalError, Reason.BUG),
        ("gap", ProtocolError, Reason.PROTOCOL),
        ("cut", ProtocolError, Reason.PROTOCOL),
        ("damaged", ProtocolError, Reason.PROTOCOL),
    ],
)
@KINDS
async def test_errors_keep_their_class(kind: str, address: str, model: str, kind_of_error: type[TandemError], reason: Reason) -> None:
    with pytest.raises(kind_of_error) as caught:
        await generate(kind, address, "hello", {"model": model, "timeout_s": 30})
    assert caught.value.reason is reason


@KINDS
async def test_an_overload_says_when_to_come_back(kind: str, address: str) -> None:
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        await generate(kind, address, "hello", {"model": "full"})
    assert caught.value.retry_after_s == 2.5
    assert caught.value.retryable


@KINDS
async def test_a_gap_cancels_the_request_on_the_server(kind: str, fake: FakeInference, address: str) -> None:
    with pytest.raises(ProtocolError):
        await generate(kind, address, "hello", {"model": "gap"})
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)


@KINDS
async def test_what_is_wrong_already_here_is_never_sent(kind: str, fake: FakeInference, address: str) -> None:
    wrong: list[tuple[Prompt, GenerateOptions]] = [("", {}), ("x", {"temperature": float("nan")}), ("\ud800", {}), ("x", {"max_tokens": 0})]
    for prompt, options in wrong:
        with pytest.raises(InvalidRequestError):
            await generate(kind, address, prompt, options)
    assert fake.requests == []


@KINDS
async def test_a_prompt_of_100_mb_is_a_typed_error(kind: str, fake: FakeInference, address: str) -> None:
    with pytest.raises(MessageTooLargeError, match="larger than max"):
        await generate(kind, address, "x" * 100_000_000, {"timeout_s": 60})
    assert fake.requests == []


@KINDS
async def test_a_prompt_of_10_mb_is_fine(kind: str, fake: FakeInference, address: str) -> None:
    await generate(kind, address, "x" * 10_000_000, {})
    assert len(fake.requests[0].text) == 10_000_000


@KINDS
async def test_a_closed_server_is_unavailable_at_once(kind: str) -> None:
    async with serve(FakeInference()) as server:
        address = server.address
    async with asyncio.timeout(20):
        with pytest.raises(UnavailableError) as caught:
            await generate(kind, address, "hello", {"timeout_s": 20})
    assert caught.value.retryable


@KINDS
async def test_a_server_that_dies_mid_stream_is_unavailable(kind: str) -> None:
    fake = FakeInference()
    async with serve(fake) as server:
        running = asyncio.create_task(generate(kind, server.address, "hello", {"model": "endless"}))
        await asyncio.wait_for(fake.has_request.wait(), 10)
    with pytest.raises((UnavailableError, CancelledRequestError)):
        await running


@KINDS
async def test_models_and_status(kind: str, address: str) -> None:
    if kind == "async":
        async with AsyncClient(address) as client:
            models, status = await client.models(), await client.status()
    else:
        with Client(address) as sync_client:
            models, status = await asyncio.to_thread(lambda: (sync_client.models(), sync_client.status()))
    assert [(model.id, model.context_tokens, model.decode_replicas) for model in models] == [("tiny", 512, 2)]
    assert (status.cluster, status.queued_requests, status.running_requests) == ("test", 3, 4)
    assert [(item.lease.replica_id, item.lease.role) for item in status.replicas] == [
        ("d-0", Role.DECODE),
        ("d-1", Role.DECODE),
        ("p-0", Role.PREFILL),
    ]
    assert [item.is_reachable for item in status.replicas] == [True, False, True]
    assert status.replicas[0].load.kv_used_fraction == 0.375


async def test_breaking_out_of_the_loop_cancels_on_the_server(fake: FakeInference, address: str) -> None:
    async with AsyncClient(address) as client:
        tokens = client.stream("hello", model="endless")
        async for _ in tokens:
            break
        await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_leaving_the_with_block_cancels_on_the_server(fake: FakeInference, address: str) -> None:
    async with AsyncClient(address) as client:
        async with client.stream("hello", model="endless") as tokens:
            assert (await anext(tokens)).token_ids == (7,)
            assert (await anext(tokens)).first_position == 1
            assert not fake.was_cancelled.is_set()
        await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_aclosing_cancels_on_the_server(fake: FakeInference, address: str) -> None:
    async with AsyncClient(address) as client:
        async with aclosing(client.stream("hello", model="endless")) as tokens:
            await anext(tokens)
        await asyncio.wait_for(fake.was_cancelled.wait(), 10)
        with pytest.raises(CancelledRequestError):
            await anext(tokens)


async def test_cancelling_the_task_cancels_on_the_server_and_stays_a_cancel(fake: FakeInference, address: str) -> None:
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.generate("hello", model="endless"))
        await asyncio.wait_for(fake.has_request.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_closing_the_client_ends_its_streams(fake: FakeInference, address: str) -> None:
    client = AsyncClient(address)
    tokens = client.stream("hello", model="endless")
    await anext(tokens)

    async def read_on() -> None:
        async for _ in tokens:
            pass

    reading = asyncio.create_task(read_on())
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(CancelledRequestError):
        await asyncio.wait_for(reading, 10)
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)
    with pytest.raises(ConfigError, match="closed"):
        await client.models()


async def test_a_finished_stream_stays_finished(address: str) -> None:
    async with AsyncClient(address) as client:
        tokens = client.stream("hello", max_tokens=1)
        assert len([chunk async for chunk in tokens]) == 1
        assert [chunk async for chunk in tokens] == []
        assert tokens.receipt is not None


async def test_a_stream_that_is_never_read_sends_nothing(fake: FakeInference, address: str) -> None:
    async with AsyncClient(address) as client, client.stream("hello") as tokens:
        assert tokens.receipt is None
    assert fake.requests == []


async def test_many_requests_share_one_client(address: str) -> None:
    async with AsyncClient(address) as client:
        completions = await asyncio.gather(*(client.generate("hello", max_tokens=5) for _ in range(50)))
    assert {completion.token_ids for completion in completions} == {(100, 101, 102, 103, 104)}


async def test_breaking_out_of_a_blocking_loop_cancels_on_the_server(fake: FakeInference, address: str) -> None:
    def run() -> None:
        with Client(address) as client:
            tokens = client.stream("hello", model="endless")
            for _ in tokens:
                break
            with pytest.raises(CancelledRequestError):
                next(tokens)

    await asyncio.to_thread(run)
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_a_blocking_stream_can_be_closed_from_another_thread(fake: FakeInference, address: str) -> None:
    with Client(address) as client:
        tokens = client.stream("hello", model="endless")
        reading = asyncio.create_task(asyncio.to_thread(lambda: list(tokens)))
        await asyncio.wait_for(fake.has_request.wait(), 10)
        tokens.close()
        with pytest.raises(CancelledRequestError):
            await reading
        await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_a_closed_blocking_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.models()
    with pytest.raises(ConfigError, match="closed"):
        client.generate("hello")


async def test_one_blocking_client_serves_many_threads(address: str) -> None:
    with Client(address) as client:
        tasks = [asyncio.to_thread(lambda: client.generate("hello", max_tokens=3)) for _ in range(10)]
        assert {completion.token_ids for completion in await asyncio.gather(*tasks)} == {(100, 101, 102)}


def test_an_async_client_refuses_a_second_event_loop() -> None:
    client = AsyncClient("127.0.0.1:9")

    async def ask() -> None:
        await client.models(timeout_s=5)

    with pytest.raises(UnavailableError):
        asyncio.run(ask())
    with pytest.raises(ConfigError, match="event loop"):
        asyncio.run(ask())
