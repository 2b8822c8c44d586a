"""A replica asks its node's store service for a prefix: a real gRPC service that does what it is told."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from kv_transfer import prefix_source
from kv_transfer.blocks import block_hashes
from kv_transfer.prefix_source import PrefixSource
from tandem.channel_pool import ChannelPool
from tandem.errors import Reason, TandemError, UnavailableError
from tandem.rpc import ServerCall, service, start_server
from tandem.v1 import store_pb2
from tests.dict_store import NAMESPACE
from tests.samples import ENGINE

pytestmark = pytest.mark.integration

INFO = replace(ENGINE, block_size_tokens=4)
TOKENS = list(range(1, 18))  # four full blocks and a token


class FakeStore:
    """Holds the first `held_blocks` of whatever it is asked for."""

    def __init__(self) -> None:
        self.held_blocks = 3
        self.error: TandemError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[store_pb2.PrefetchRequest] = []
        self.remaining_s: float | None = None

    async def prefetch(self, request: store_pb2.PrefetchRequest, its_call: ServerCall) -> store_pb2.PrefetchResponse:
        self.asked.append(request)
        self.remaining_s = its_call.time_remaining_s()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return store_pb2.PrefetchResponse(held_blocks=min(self.held_blocks, len(request.block_hashes)))

    async def refuse(self, request: object, its_call: ServerCall) -> None:
        raise AssertionError

    stat = lookup = copy = evict = watch = refuse


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest_asyncio.fixture
async def source(store: FakeStore) -> AsyncIterator[PrefixSource]:
    channels = ChannelPool()
    server = await start_server("127.0.0.1", 0, {"tandem.v1.Store": service(store_pb2, "Store", store)})
    yield PrefixSource(INFO, NAMESPACE, channels, server.address, wait_s=0.5)
    store.gate.set()
    await channels.close()
    await server.stop(0.0)


async def test_the_full_blocks_of_a_prompt_are_asked_for_by_their_names(store: FakeStore, source: PrefixSource) -> None:
    assert await source.bring(TOKENS, "tenant", None) == 3
    (asked,) = store.asked
    assert (asked.namespace, list(asked.block_hashes)) == (NAMESPACE, block_hashes(TOKENS, 4, "tenant"))


@pytest.mark.parametrize(("tokens", "asked_blocks"), [(0, []), (8, []), (9, [2]), (12, [2]), (13, [3])])
async def test_one_token_is_left_to_compute_and_less_than_two_blocks_are_not_asked_for(
    store: FakeStore, source: PrefixSource, tokens: int, asked_blocks: list[int]
) -> None:
    await source.bring(TOKENS[:tokens], "", None)
    assert [len(asked.block_hashes) for asked in store.asked] == asked_blocks


async def test_a_request_with_little_time_left_waits_no_longer_than_that(store: FakeStore, source: PrefixSource) -> None:
    await source.bring(TOKENS, "", 0.2)
    assert store.remaining_s is not None
    assert store.remaining_s <= 0.2


async def test_no_request_waits_longer_than_the_bound(store: FakeStore, source: PrefixSource) -> None:
    store.gate.clear()
    async with asyncio.timeout(10.0):
        assert await source.bring(TOKENS, "", 1e6) == 0


@pytest.mark.parametrize("trouble", ["error", "silence"])
async def test_after_a_failure_nobody_asks_for_a_while(store: FakeStore, source: PrefixSource, trouble: str) -> None:
    if trouble == "error":
        store.error = UnavailableError("gone", reason=Reason.WORKER_LOST)
    else:
        store.gate.clear()
    for _ in range(5):
        assert await source.bring(TOKENS, "", None) == 0
    assert len(store.asked) == 1


async def test_a_request_that_had_hardly_any_time_left_stops_nobody_else(store: FakeStore, source: PrefixSource) -> None:
    store.gate.clear()
    assert await source.bring(TOKENS, "", 0.05) == 0
    store.gate.set()
    assert await source.bring(TOKENS, "", None) == 3


async def test_after_the_pause_it_is_asked_again(store: FakeStore, source: PrefixSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_source, "_PAUSE_S", 0.0)
    store.error = UnavailableError("gone", reason=Reason.WORKER_LOST)
    assert await source.bring(TOKENS, "", None) == 0
    store.error = None
    assert await source.bring(TOKENS, "", None) == 3


async def test_a_service_that_is_not_there_costs_nothing_but_the_blocks() -> None:
    channels = ChannelPool()
    source = PrefixSource(INFO, NAMESPACE, channels, "127.0.0.1:1", wait_s=5.0)
    assert [await source.bring(TOKENS, "", None) for _ in range(3)] == [0, 0, 0]
    await channels.close()
