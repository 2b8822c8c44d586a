"""A prefix whose holder queues is copied to another node's store by the real services, once, and placements there see it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.placement import Placement
from router.prefix_copies import PrefixCopies
from router.shell import RouterShell
from router.stores import Stores
from tandem.deadline import Deadline
from tandem.domain import Plan, ReplicaId, RequestId, Role, WorkerLoad
from tandem.polling import poll_until
from tandem.telemetry import RouterMetrics
from tests.dict_store import NAMESPACE, key
from tests.samples import ENGINE, make_lease, make_request
from tests.store_benches import hashes_of
from tests.store_nodes import WAIT_S, Node, running_nodes

pytestmark = pytest.mark.integration

KEYS = [key(number) for number in range(100)]
TOKENS = len(KEYS) * ENGINE.block_size_tokens
A, B = ReplicaId("prefill-a"), ReplicaId("prefill-b")


class Router:
    """A shell over two nodes with a prefill worker each, at a time that goes on by a second with each request."""

    def __init__(self, *nodes: Node) -> None:
        self.registry = CollectorRegistry()
        config = RouterConfig(one_worker_max_tokens=0)
        self.core = RouterCore(config, Random(1))
        self.now_s = 0.0
        self.shell = RouterShell(config, self.core, RouterMetrics(self.registry), lambda: self.now_s)
        self.stores = Stores(self.shell, Random(2))
        self.copies = PrefixCopies(self.shell, self.stores)
        for node in nodes:
            self.shell.replica_seen(make_lease(f"prefill-{node.name}", Role.PREFILL, node=node.name, namespace=NAMESPACE))
        self.shell.replica_seen(make_lease("decode-a", node="a", namespace=NAMESPACE))
        for blocks in (1, 10, 100) * 10:  # a slow link: fetching takes as long as computing
            size_bytes = blocks * ENGINE.kv_block_bytes
            self.core.predictor.observe_transfer("m", size_bytes=size_bytes, is_same_node=False, transfer_s=0.005 * blocks)
        self.stores.follow({node.name: node.address for node in nodes})

    def queues(self, name: ReplicaId, tokens: int) -> None:
        """Other routers have sent the worker so much."""
        lease = self.core.fleet.get(name)
        assert lease is not None
        self.shell.report(lease, lease.incarnation, 1, WorkerLoad(pending_prefill_tokens=tokens), ())

    def send(self) -> tuple[Plan, Placement]:
        """One request of the prefix, which ends at once; where it was placed."""
        self.now_s += 1.0
        request = make_request(f"r{self.now_s}", TOKENS + 8)
        ticket = self.shell.submit(request, hashes_of(KEYS), Deadline(None))
        decision = self.core.decisions.get(RequestId(request.request_id))
        self.shell.close(ticket)
        assert decision is not None
        assert decision.plan is not None
        assert decision.placement is not None
        return decision.plan, decision.placement

    def believed(self, node: str) -> int:
        return self.core.prefixes.match(hashes_of(KEYS)).store_blocks(node, NAMESPACE)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tandem_router_{name}_total", labels) or 0.0


@asynccontextmanager
async def router_of(*nodes: Node) -> AsyncIterator[Router]:
    router = Router(*nodes)
    tasks = [asyncio.create_task(router.stores.watch_forever()), asyncio.create_task(router.copies.run())]
    try:
        async with asyncio.timeout(WAIT_S):
            await poll_until(lambda: router.believed("a") == len(KEYS), 0.02)
        yield router
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_hot_prefix_is_copied_once_and_then_found_on_the_other_node(tmp_path: Path) -> None:
    near, far = Node("a", tmp_path), Node("b", tmp_path)
    async with running_nodes(near, far):
        near.fill(KEYS)
        await far.connect(near)
        async with router_of(near, far) as router:
            assert router.send()[1].worker.replica_id == A
            router.queues(A, TOKENS // 2)  # half of what it takes to compute the prefix elsewhere
            placed = []
            while not router.shell.core.hot_prefixes.copying:
                placed.append(router.send()[1].worker.replica_id)
            assert placed == [A] * len(placed)
            assert len(placed) >= 4
            async with asyncio.timeout(WAIT_S):
                await poll_until(lambda: router.believed("b") == len(KEYS), 0.02)
                await poll_until(lambda: not router.shell.core.hot_prefixes.copying, 0.02)
            assert far.held(KEYS) == len(KEYS)
            for _ in range(20):
                plan, placement = router.send()
                assert placement.worker.replica_id == B
                assert plan.cached_blocks == len(KEYS)
                assert placement.assignment.considered[0].fetched_tokens == 0
            assert (router.value("prefix_copies", outcome="copied"), router.value("prefix_copied_blocks")) == (1, len(KEYS))
            assert await far.metric("fetched_blocks_total") == len(KEYS)


async def test_a_copy_whose_source_is_gone_costs_no_request_anything(tmp_path: Path) -> None:
    near, far = Node("a", tmp_path), Node("b", tmp_path)
    async with running_nodes(near, far):
        near.fill(KEYS)
        async with router_of(near, far) as router:
            router.stores.follow({"a": "127.0.0.1:1", "b": far.address})
            router.queues(A, TOKENS // 2)
            while not router.shell.core.hot_prefixes.copying:
                router.send()
            assert router.send()[1].worker.replica_id == A
            async with asyncio.timeout(WAIT_S):
                await poll_until(lambda: router.value("prefix_copies", outcome="failed") == 1, 0.02)
            assert not router.shell.core.hot_prefixes.copying
            assert router.believed("b") == 0
