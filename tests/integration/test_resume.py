"""A stream goes on through another router from its last token: both clients, fake routers on real gRPC."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tandem import AsyncClient, Client
from tandem.chaos.proxy import Proxy
from tandem.domain import Chunk, FinishReason, Receipt
from tandem.errors import TandemError, UnavailableError
from tests.integration.fake_inference import FakeInference, serve

pytestmark = pytest.mark.integration

KINDS = pytest.mark.parametrize("kind", ["async", "sync"])
TOKENS = tuple(range(100, 110))


class Seen:
    """What came through a client, and the error that ended it."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.receipt: Receipt | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


async def read(kind: str, endpoint: str, **options: object) -> Seen:
    """One request of ten tokens to its end."""
    seen, wanted = Seen(), {"max_tokens": 10, "timeout_s": 20.0, **options}
    if kind == "async":
        async with AsyncClient(endpoint) as client, client.stream("hello", **wanted) as stream:  # type: ignore[arg-type]
            async for chunk in stream:
                seen.chunks.append(chunk)
            seen.receipt = stream.receipt
        return seen

    def block() -> None:
        with Client(endpoint) as client, client.stream("hello", **wanted) as stream:  # type: ignore[arg-type]
            seen.chunks.extend(stream)
            seen.receipt = stream.receipt

    await asyncio.to_thread(block)
    return seen


async def lose(fake: FakeInference, stop: Callable[[], Awaitable[None]]) -> None:
    await asyncio.wait_for(fake.holds.wait(), 20)
    await stop()


@KINDS
async def test_the_joined_tokens_are_those_of_an_undisturbed_stream(kind: str) -> None:
    first, second = FakeInference(holds_at=4), FakeInference()
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(serve(fake)) for fake in (first, second)]
        reading = asyncio.create_task(read(kind, f"{one.address},{two.address}", request_id="mine"))
        await lose(first, lambda: one.stop(0.0))
        seen = await reading
    assert seen.token_ids == TOKENS
    assert seen.text == "".join(f"t{token} " for token in TOKENS)
    assert seen.chunks[-1].finish_reason is FinishReason.LENGTH
    (resumed,) = second.requests
    assert tuple(resumed.resume_token_ids) == TOKENS[:4]
    assert (resumed.first_position, resumed.request_id) == (4, "mine~2")
    assert seen.receipt is not None
    assert (seen.receipt.request_id, seen.receipt.attempts) == ("mine", 2)


@KINDS
async def test_it_goes_on_through_a_router_it_has_only_learned_of(kind: str) -> None:
    second = FakeInference()
    async with serve(second) as two:
        first = FakeInference(holds_at=4, routers=f"127.0.0.1:1,{two.address}")
        async with serve(first) as one:
            reading = asyncio.create_task(read(kind, one.address))
            await lose(first, lambda: one.stop(0.0))
            assert (await reading).token_ids == TOKENS
    assert tuple(second.requests[0].resume_token_ids) == TOKENS[:4]


@KINDS
async def test_it_goes_on_through_the_same_router_once_it_is_back(kind: str) -> None:
    first, second = FakeInference(holds_at=4), FakeInference()
    async with AsyncExitStack() as stack:
        async with serve(first) as one:
            reading = asyncio.create_task(read(kind, one.address))
            await lose(first, lambda: one.stop(0.0))
        await asyncio.sleep(0.5)
        await stack.enter_async_context(serve(second, port=one.port))
        assert (await reading).token_ids == TOKENS


@KINDS
async def test_a_router_that_hangs_is_given_up(kind: str) -> None:
    """It takes connections and says nothing, as a process that is stopped does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fake = FakeInference()
        async with serve(fake) as two:
            seen = await read(kind, f"127.0.0.1:{silent.getsockname()[1]},{two.address}")
    assert seen.token_ids == TOKENS


async def test_a_connection_that_brings_nothing_and_does_not_end_is_given_up() -> None:
    """As a network does that drops everything: the client's kernel never learns of it."""
    first, second = FakeInference(holds_at=4), FakeInference()
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(serve(fake)) for fake in (first, second)]
        proxy = Proxy(one.address)
        await proxy.start()
        stack.push_async_callback(proxy.close)

        async def cut_off() -> None:
            proxy.black_hole()

        reading = asyncio.create_task(read("async", f"{proxy.address},{two.address}"))
        await lose(first, cut_off)
        assert (await reading).token_ids == TOKENS
    assert tuple(second.requests[0].resume_token_ids) == TOKENS[:4]


@KINDS
async def test_a_resumed_request_that_is_lost_resumes_after_all_its_tokens(kind: str) -> None:
    first, second = FakeInference(holds_at=6), FakeInference()
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(serve(fake)) for fake in (first, second)]
        endpoint = f"{one.address},{two.address}"
        reading = asyncio.create_task(read(kind, endpoint, resume_token_ids=[100, 101]))
        await lose(first, lambda: one.stop(0.0))
        assert (await reading).token_ids == TOKENS[2:]
    assert tuple(second.requests[0].resume_token_ids) == TOKENS[:6]


@KINDS
async def test_several_choices_end_with_the_loss(kind: str) -> None:
    first, second = FakeInference(holds_at=4), FakeInference()
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(serve(fake)) for fake in (first, second)]
        reading = asyncio.create_task(read(kind, f"{one.address},{two.address}", n=2))
        await lose(first, lambda: one.stop(0.0))
        with pytest.raises(TandemError):
            await reading
    assert not second.requests


@KINDS
async def test_the_deadline_holds_over_all_streams(kind: str) -> None:
    first = FakeInference(holds_at=4)
    async with serve(first) as one:
        reading = asyncio.create_task(read(kind, one.address, timeout_s=1.5))
        await lose(first, lambda: one.stop(0.0))
        with pytest.raises(TandemError) as caught:
            await reading
    assert isinstance(caught.value, UnavailableError) or caught.value.reason == "deadline"


async def test_a_client_begins_at_its_first_router_whatever_others_of_the_process_have_open() -> None:
    first, second = FakeInference(), FakeInference()
    async with AsyncExitStack() as stack:
        two = await stack.enter_async_context(serve(second))
        async with serve(first) as gone:
            pass
        endpoint = f"{gone.address},{two.address}"
        other = await stack.enter_async_context(AsyncClient(endpoint))
        await other.generate("hello", max_tokens=1)
        assert len(second.requests) == 1
        await stack.enter_async_context(serve(first, int(gone.address.rpartition(":")[2])))
        await read("async", endpoint)
        await read("sync", endpoint)
    assert [len(fake.requests) for fake in (first, second)] == [2, 1]
