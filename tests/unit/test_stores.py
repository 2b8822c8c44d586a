"""What store services tell of their blocks reaches the prefix index, and goes when their leases do."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import cast

import grpc.aio
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.shell import RouterShell
from router.stores import Stores
from tandem.convert import block_change_to_pb
from tandem.domain import BlockHash, Namespace
from tandem.held_blocks import BlockChange
from tandem.telemetry import RouterMetrics
from tandem.v1 import store_pb2
from tests.fake_channel import FakeChannel

NAMESPACE = Namespace("ab" * 16)
HASHES = [BlockHash(hashlib.sha256(bytes([number])).digest()) for number in range(4)]


def stored(*hashes: BlockHash) -> BlockChange:
    return BlockChange(stored=b"".join(block_hash[:8] for block_hash in hashes))


def message(node: str, change: BlockChange | None = None) -> store_pb2.StoreWatchResponse:
    events = [] if change is None else [store_pb2.NamespaceEvents(namespace=NAMESPACE, block_events=block_change_to_pb(change))]
    return store_pb2.StoreWatchResponse(node=node, namespaces=events)


class Bench:
    """Stores over fake channels."""

    def __init__(self) -> None:
        self.core = RouterCore(RouterConfig(), Random(1))
        self.shell = RouterShell(RouterConfig(), self.core, RouterMetrics(CollectorRegistry()), lambda: 0.0)
        self.channels: dict[str, FakeChannel] = {}
        self.stores = Stores(self.shell, Random(2), self._connect)

    async def says(self, address: str, *messages: store_pb2.StoreWatchResponse) -> None:
        for one in messages:
            self.channels[address].streams[-1].put(one)
        await settle()

    def blocks(self, node: str) -> int:
        """How many leading blocks the index knows in that node's store."""
        return self.core.prefixes.match(HASHES).store_blocks(node, NAMESPACE)

    def _connect(self, address: str) -> grpc.aio.Channel:
        channel = self.channels[address] = FakeChannel()
        return cast("grpc.aio.Channel", channel)


async def settle() -> None:
    """Lets every task run as far as it gets by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def watching(**addresses: str) -> AsyncIterator[Bench]:
    bench = Bench()
    bench.stores.follow(addresses)
    task = asyncio.create_task(bench.stores.watch_forever())
    await settle()
    yield bench
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert all(channel.is_closed for channel in bench.channels.values())


async def test_what_stores_hold_is_known_node_by_node() -> None:
    async with watching(a="a:1", b="b:1") as bench:
        await bench.says("a:1", message("a", stored(*HASHES)), message("a", BlockChange(removed=HASHES[2][:8])))
        await bench.says("b:1", message("b", stored(HASHES[0])), message("b"))
        assert (bench.blocks("a"), bench.blocks("b")) == (2, 1)


async def test_what_a_node_holds_goes_with_its_lease() -> None:
    async with watching(a="a:1") as bench:
        await bench.says("a:1", message("a", stored(*HASHES)))
        bench.stores.follow({})
        await settle()
        assert bench.blocks("a") == 0
        assert bench.channels["a:1"].is_closed
        bench.stores.follow({"a": "a:1"})
        await settle()
        await bench.says("a:1", message("a", stored(HASHES[0])))
        assert bench.blocks("a") == 1


async def test_a_service_that_moved_is_believed_until_it_tells_anew() -> None:
    async with watching(a="a:1") as bench:
        await bench.says("a:1", message("a", stored(*HASHES)))
        bench.stores.follow({"a": "a:2"})
        await settle()
        assert bench.blocks("a") == 4
        await bench.says("a:2", message("a", stored(HASHES[0])))
        assert bench.blocks("a") == 1
        bench.stores.follow({"a": "a:2"})
        assert bench.blocks("a") == 1


async def test_a_stream_that_ends_leaves_what_it_told() -> None:
    async with watching(a="a:1") as bench:
        await bench.says("a:1", message("a", stored(*HASHES)))
        bench.channels["a:1"].streams[-1].put(None)
        await settle()
        assert bench.blocks("a") == 4


async def test_the_service_of_another_node_is_not_believed() -> None:
    async with watching(a="a:1") as bench:
        await bench.says("a:1", message("b", stored(*HASHES)))
        assert (bench.blocks("a"), bench.blocks("b")) == (0, 0)


async def test_services_with_a_lease_can_be_reached() -> None:
    async with watching(a="a:1") as bench:
        link = bench.stores.reach("a")
        assert link is not None
        assert link[1] == "a:1"
        bench.stores.follow({})
        assert bench.stores.reach("a") is None
        await settle()
