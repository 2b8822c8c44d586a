"""What a store service's process tells of its arena, as a router's prefix index has it, across restarts of either."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.shell import RouterShell
from router.stores import Stores
from tandem.polling import poll_until
from tandem.telemetry import RouterMetrics
from tests.dict_store import NAMESPACE, key
from tests.store_benches import hashes_of
from tests.store_nodes import WAIT_S, Node, running_nodes

pytestmark = pytest.mark.integration

KEYS = [key(number) for number in range(200)]


@asynccontextmanager
async def router_of(node: Node) -> AsyncIterator[Callable[[], int]]:
    """A router that has just started; what it believes to be in the node's store, in leading blocks of all keys."""
    core = RouterCore(RouterConfig(), Random(1))
    stores = Stores(RouterShell(RouterConfig(), core, RouterMetrics(CollectorRegistry())), Random(2))
    stores.follow({node.name: node.address})
    watching = asyncio.create_task(stores.watch_forever())
    yield lambda: core.prefixes.match(hashes_of(KEYS)).store_blocks(node.name, NAMESPACE)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        await poll_until(condition, 0.02)


async def test_routers_know_what_the_arena_holds_through_restarts_of_both(tmp_path: Path) -> None:
    node = Node("a", tmp_path)
    async with running_nodes(node):
        node.fill(KEYS[:100])
        async with router_of(node) as believed:
            await until(lambda: believed() == 100)
            node.fill(KEYS[100:])
            await until(lambda: believed() == 200)
            node.store.drop(NAMESPACE, hashes_of(KEYS[150:151]))
            await until(lambda: believed() == 150)
            node.signal(signal.SIGKILL)
            await node.wait()
            node.store.drop(NAMESPACE, hashes_of(KEYS[50:51]))
            assert believed() == 150  # not known yet, and nothing else is forgotten
            await node.start()
            await until(lambda: believed() == 50)
        async with router_of(node) as restarted:
            await until(lambda: restarted() == 50)


async def test_a_service_with_listeners_stops_at_once(tmp_path: Path) -> None:
    node = Node("a", tmp_path)
    async with running_nodes(node):
        node.fill(KEYS[:1])
        async with router_of(node) as believed:
            await until(lambda: believed() == 1)
            node.signal(signal.SIGTERM)
            async with asyncio.timeout(10.0):
                assert await node.wait() == 0
