"""Prefixes brought from other nodes by the cluster's directory: real store services that share a real Redis."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from kv_transfer.blocks import BlockKey
from kv_transfer.redis_directory import RedisDirectory
from tandem.errors import InvalidRequestError, UnavailableError
from tandem.rpc import call
from tandem.v1 import store_pb2
from tests.dict_store import NAMESPACE, key
from tests.redis_process import RedisProcess
from tests.store_benches import hashes_of
from tests.store_nodes import WAIT_S, Node, running_nodes

pytestmark = pytest.mark.integration
pytest_plugins = ("tests.integration.redis_fixtures",)

CLUSTER = "c1"
KEYS = [key(number) for number in range(40)]


class Cluster:
    """Nodes that share a directory; `announced` waits until it knows of blocks."""

    def __init__(self, folder: Path, server: RedisProcess) -> None:
        self.server = server
        self.directory = RedisDirectory(server.url, CLUSTER)
        self._folder = folder
        self.far, self.near = self.node("far"), self.node("near")

    def node(self, name: str) -> Node:
        """One more, that is not started."""
        return Node(name, self._folder, options=("--share", f"--cluster={CLUSTER}"), environment={"REDIS_URL": self.server.url})

    async def announced(self, keys: Sequence[BlockKey], *nodes: Node) -> None:
        """Exactly these nodes are said to hold the blocks."""
        wanted = [frozenset(node.address for node in nodes)] * len(keys)
        async with asyncio.timeout(WAIT_S):
            while await self.directory.holders(NAMESPACE, hashes_of(keys)) != wanted:  # noqa: ASYNC110  # another process makes it so
                await asyncio.sleep(0.01)

    async def fill(self, node: Node, keys: Sequence[BlockKey]) -> None:
        node.fill(keys)
        await self.announced(keys, node)

    async def close(self) -> None:
        await self.directory.close()


@pytest_asyncio.fixture
async def cluster(tmp_path: Path, server: RedisProcess) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path, server)
    async with running_nodes(cluster.far, cluster.near):
        await cluster.near.connect(cluster.far)
        yield cluster
    await cluster.close()


@asynccontextmanager
async def stopped(node: Node) -> AsyncIterator[None]:
    node.signal(signal.SIGSTOP)
    yield
    node.signal(signal.SIGCONT)


class TestBringing:
    async def test_a_prefix_comes_from_the_node_that_holds_it(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        assert await cluster.near.prefetch(KEYS) == 40
        assert cluster.near.held(KEYS) == 40
        assert await cluster.far.metric("served_blocks_total") == 40
        await cluster.announced(KEYS, cluster.far, cluster.near)

    async def test_only_what_is_not_here_comes(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.near.fill(KEYS[:30])
        assert await cluster.near.prefetch(KEYS) == 40
        assert await cluster.far.metric("served_blocks_total") == 10

    async def test_a_prefix_is_brought_together_from_two_nodes(self, cluster: Cluster) -> None:
        third = cluster.node("third")
        async with running_nodes(third):
            await cluster.near.connect(third)
            await cluster.fill(cluster.far, KEYS[:25])
            await cluster.fill(third, KEYS[25:])
            assert await cluster.near.prefetch(KEYS) == 40
            assert (await cluster.far.metric("served_blocks_total"), await third.metric("served_blocks_total")) == (25, 15)

    async def test_the_node_with_the_longest_run_is_asked(self, cluster: Cluster) -> None:
        third = cluster.node("third")
        async with running_nodes(third):
            await cluster.near.connect(third)
            cluster.far.fill(KEYS[:5])
            await cluster.fill(third, KEYS[5:])
            third.fill(KEYS[:5])
            await cluster.announced(KEYS[:5], cluster.far, third)
            assert await cluster.near.prefetch(KEYS) == 40
            assert await cluster.far.metric("served_blocks_total") == 0

    async def test_it_stops_at_the_first_block_that_nobody_holds(self, cluster: Cluster) -> None:
        cluster.far.fill(KEYS[:10])
        await cluster.fill(cluster.far, KEYS[20:])
        await cluster.announced(KEYS[:10], cluster.far)
        assert await cluster.near.prefetch(KEYS) == 10
        assert cluster.near.held(KEYS) == 10

    async def test_what_nobody_holds_is_no_error(self, cluster: Cluster) -> None:
        assert await cluster.near.prefetch(KEYS) == 0
        assert await cluster.near.prefetch([]) == 0

    async def test_what_is_brought_is_leased_until_it_is_loaded(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        await cluster.near.prefetch(KEYS)
        assert cluster.near.store.upkeep.census().leased_blocks == 40

    async def test_many_at_once_bring_each_block_once(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        assert await asyncio.gather(*(cluster.near.prefetch(KEYS) for _ in range(8))) == [40] * 8
        assert await cluster.far.metric("served_blocks_total") == 40

    async def test_names_that_are_none_are_refused(self, cluster: Cluster) -> None:
        request = store_pb2.PrefetchRequest(namespace="../..", block_hashes=[b"x" * 32])
        with pytest.raises(InvalidRequestError):
            await call(cluster.near.channel, "tandem.v1.Store/Prefetch", request, store_pb2.PrefetchResponse, timeout_s=WAIT_S)


class TestDirectory:
    async def test_blocks_that_are_dropped_are_withdrawn(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        assert cluster.far.store.drop(NAMESPACE, hashes_of(KEYS)) == 40
        await cluster.announced(KEYS)

    async def test_a_hint_that_is_wrong_costs_the_blocks_and_no_error(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS[:10])
        await cluster.directory.announce(NAMESPACE, hashes_of(KEYS[10:]), cluster.far.address, 60.0)
        assert await cluster.near.prefetch(KEYS) == 10

    async def test_a_holder_that_is_gone_costs_the_blocks_and_no_error(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.near.fill(KEYS[:3])
        cluster.far.signal(signal.SIGKILL)
        await cluster.far.wait()
        assert await cluster.near.prefetch(KEYS) == 3

    async def test_a_holder_that_is_gone_hides_no_other(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS[:20])
        await cluster.directory.announce(NAMESPACE, hashes_of(KEYS), "127.0.0.1:1", 60.0)
        assert await cluster.near.prefetch(KEYS) == 20

    async def test_a_service_that_ends_withdraws_what_it_held(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.far.signal(signal.SIGTERM)
        await cluster.far.wait()
        await cluster.announced(KEYS)

    async def test_a_holder_that_hangs_costs_no_more_than_the_calls_time(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.near.fill(KEYS[:3])
        async with stopped(cluster.far):
            assert await cluster.near.prefetch(KEYS, timeout_s=1.0) == 3

    async def test_addresses_that_are_none_in_the_directory_cost_no_error(self, cluster: Cluster) -> None:
        await cluster.directory.announce(NAMESPACE, hashes_of(KEYS), "nonsense", 60.0)
        assert await cluster.near.prefetch(KEYS) == 0

    async def test_where_it_is_down_what_is_here_is_the_answer(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.near.fill(KEYS[:7])
        cluster.server.kill()
        assert await cluster.near.prefetch(KEYS) == 7

    async def test_where_it_hangs_what_is_here_is_the_answer(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS)
        cluster.near.fill(KEYS[:7])
        cluster.server.hang()
        assert await cluster.near.prefetch(KEYS) == 7
        cluster.server.go_on()

    async def test_after_a_restart_that_lost_everything_blocks_are_found_again(self, cluster: Cluster) -> None:
        await cluster.fill(cluster.far, KEYS[:20])
        cluster.server.kill()
        cluster.far.fill(KEYS[20:])  # something to tell, so that the loss is seen
        await asyncio.sleep(0.5)  # two looks
        await cluster.server.start()
        await cluster.announced(KEYS, cluster.far)
        assert await cluster.near.prefetch(KEYS) == 40

    async def test_a_node_that_does_not_share_is_neither_found_nor_looks(self, cluster: Cluster, tmp_path: Path) -> None:
        await cluster.fill(cluster.far, KEYS[:20])
        alone = Node("alone", tmp_path, environment={"REDIS_URL": cluster.server.url}, options=(f"--cluster={CLUSTER}",))
        alone.fill(KEYS[20:])
        async with running_nodes(alone):
            assert await alone.prefetch(KEYS) == 0
            assert await cluster.near.prefetch(KEYS) == 20


async def test_a_directory_without_its_server_says_so(server: RedisProcess) -> None:
    server.kill()
    directory = RedisDirectory(server.url, CLUSTER)
    for question in (
        directory.holders(NAMESPACE, hashes_of(KEYS)),
        directory.announce(NAMESPACE, hashes_of(KEYS), "a:1", 1.0),
        directory.withdraw(NAMESPACE, hashes_of(KEYS), "a:1"),
    ):
        with pytest.raises(UnavailableError):
            await question
    await directory.close()
