"""Hand-off between two nodes on real vLLM: each node has an arena and a store service of its own, and every token is a plain engine's."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from kv_transfer.blocks import block_hashes
from kv_transfer.redis_directory import RedisDirectory
from tandem.config import MIB, EngineConfig, ReplicaConfig
from tandem.demo import DirectCaller, Prompts, Run
from tandem.domain import PlannedWorker, Receipt, ReplicaId, Role
from tandem.engine.model_files import BUNDLED_MODEL, resolve_model, served_name
from tandem.launch import ReplicaProcess
from tandem.rpc import open_channel, open_stream
from tandem.v1 import worker_pb2
from tandem.zygote_client import ZygoteClient
from tests.bare_platform import BareOptions, BarePlatform
from tests.redis_process import running_redis
from tests.store_nodes import BLOCK_BYTES, WAIT_S, Node, read_metric, running_nodes

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

BLOCK_TOKENS = 32
MAX_TOKENS = 24


class AcrossNodes(DirectCaller):
    """Calls a decode replica by the plan that a router makes where the prefill replica is on another node."""

    def __init__(self, decode: ReplicaProcess, prefill: ReplicaProcess) -> None:
        super().__init__(decode)
        config = prefill.config
        worker = PlannedWorker(
            replica_id=ReplicaId(config.replica_id),
            incarnation=config.incarnation,
            address=prefill.address,
            node=config.node,
            store_address=config.store_address,
        )
        self._plan = replace(self._plan, prefill=(worker,))


@dataclass
class TwoNodes:
    """A prefill worker on the far node, a decode worker on the near one, and a plain engine."""

    far: Node
    near: Node
    prefill: DirectCaller
    pair: DirectCaller
    decode: DirectCaller
    plain: DirectCaller
    directory: RedisDirectory
    prompts: Prompts
    metrics_address: str

    async def both(self, token_ids: list[int]) -> Receipt:
        """Runs a prompt on the two nodes and on the plain engine; the receipt of the first, whose tokens must be the second's."""
        ours, plain = await self.pair.run(token_ids, MAX_TOKENS), await self.plain.run(token_ids, MAX_TOKENS)
        assert (ours.token_ids, ours.text) == (plain.token_ids, plain.text), len(token_ids)
        assert ours.receipt is not None
        assert ours.receipt.handed_off
        return ours.receipt

    async def metric(self, name: str) -> float:
        return await asyncio.to_thread(read_metric, self.metrics_address, f"tandem_kv_remote_{name}")


@asynccontextmanager
async def open_directory(url: str) -> AsyncIterator[RedisDirectory]:
    directory = RedisDirectory(url, "c1")
    yield directory
    await directory.close()


async def start_replica(
    platform: BarePlatform, role: Role, node: Node, name: str, *, is_kv_transfer_on: bool = True, is_prefetching: bool = False
) -> ReplicaProcess:
    config = ReplicaConfig(
        replica_id=name,
        role=role,
        incarnation=1,
        served_model=served_name(BUNDLED_MODEL),
        engine=EngineConfig(
            model=str(resolve_model(BUNDLED_MODEL)),
            kv_cache_bytes=64 * MIB + 50_000,  # no whole number of blocks
            max_num_batched_tokens=512,  # long prompts take several chunks
            store_dir=str(node.folder),
            is_kv_transfer_on=is_kv_transfer_on,
        ),
        node=node.name,
        store_address=node.address,
        runtime_dir=str(platform.runtime_dir),
        log_path=str(platform.runtime_dir / f"{name}.log"),
        publish_wait_s=3.0,
        prefetch_wait_s=WAIT_S if is_prefetching else 0.0,
    )
    replica = await ZygoteClient(platform.zygote_socket, wait_s=1.0).start_replica(config)
    await replica.wait_ready()
    return replica


async def read_metrics_address(replica: ReplicaProcess) -> str:
    channel = open_channel(replica.address)
    async with open_stream(channel, "tandem.v1.Worker/Watch", worker_pb2.WatchRequest(router_id="test"), timeout_s=10.0) as stream:
        payload = await stream.read()
    await channel.close(None)
    assert payload is not None
    return worker_pb2.WatchResponse.FromString(payload).lease.metrics_address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory, zygote_socket: Path | None) -> AsyncIterator[TwoNodes]:
    folder: Path = tmp_path_factory.mktemp("nodes")
    platform = BarePlatform(BareOptions(prefill=0, decode=0, routers=0, zygote_socket=zygote_socket))
    replicas: list[ReplicaProcess] = []
    callers: list[DirectCaller] = []

    async def start(role: Role, node: Node, name: str, *, is_kv_transfer_on: bool = True, is_prefetching: bool = False) -> ReplicaProcess:
        replicas.append(await start_replica(platform, role, node, name, is_kv_transfer_on=is_kv_transfer_on, is_prefetching=is_prefetching))
        return replicas[-1]

    try:
        await platform.start()
        async with running_redis(folder) as redis, open_directory(redis.url) as directory:
            far, near = (
                Node(name, folder, options=("--share", "--cluster=c1"), environment={"REDIS_URL": redis.url}) for name in ("far", "near")
            )
            async with running_nodes(far, near):
                await near.connect(far)
                prefill = await start(Role.PREFILL, far, "far-prefill")
                decode = await start(Role.DECODE, near, "near-decode", is_prefetching=True)
                plain = await start(Role.DECODE, near, "plain", is_kv_transfer_on=False)
                made = TwoNodes(
                    far=far,
                    near=near,
                    prefill=DirectCaller(prefill),
                    pair=AcrossNodes(decode, prefill),
                    decode=DirectCaller(decode),
                    plain=DirectCaller(plain),
                    directory=directory,
                    prompts=Prompts(),
                    metrics_address=await read_metrics_address(decode),
                )
                callers += [made.prefill, made.pair, made.decode, made.plain]
                yield made
    finally:
        for caller in callers:
            await caller.close()
        await asyncio.gather(*(replica.stop() for replica in replicas))
        await platform.stop()


async def test_every_block_travels_and_every_token_is_a_plain_engines(nodes: TwoNodes) -> None:
    fetched_blocks = await nodes.near.metric("fetched_blocks_total")
    recomputed_blocks = await nodes.metric("recomputed_blocks_total")
    sent_blocks = 0
    for length in (33, 64, 65, 200, 512, 777, 1024, 1500):
        receipt = await nodes.both(nodes.prompts.next(length))
        assert receipt.kv_bytes_shipped == length // BLOCK_TOKENS * BLOCK_BYTES
        assert receipt.decode_recomputed_tokens <= BLOCK_TOKENS
        sent_blocks += length // BLOCK_TOKENS
    assert await nodes.near.metric("fetched_blocks_total") - fetched_blocks == sent_blocks
    assert await nodes.metric("recomputed_blocks_total") == recomputed_blocks


async def test_concurrent_requests_are_all_exact(nodes: TwoNodes) -> None:
    prompts = [nodes.prompts.next(length) for length in (100, 333, 640, 900) * 3]
    plains = [await nodes.plain.run(token_ids, MAX_TOKENS) for token_ids in prompts]
    ours: list[Run] = await asyncio.gather(*(nodes.pair.run(token_ids, MAX_TOKENS) for token_ids in prompts))
    assert [run.token_ids for run in ours] == [run.token_ids for run in plains]
    assert all(run.receipt is not None and run.receipt.kv_bytes_shipped > 0 for run in ours)


async def test_damaged_blocks_are_not_served_but_published_or_computed_again(nodes: TwoNodes) -> None:
    token_ids = nodes.prompts.next(640)
    await nodes.prefill.run(token_ids, 1)  # fills the far node's arena
    corrupt_blocks = await nodes.far.metric("corrupt_blocks_total")
    damaged = nodes.far.blocks.held()
    for wanted in damaged:
        nodes.far.blocks.flip(wanted, 5000)
    await nodes.both(token_ids)
    assert await nodes.far.metric("corrupt_blocks_total") > corrupt_blocks


async def test_a_prefix_that_another_node_computed_is_not_computed_again(nodes: TwoNodes) -> None:
    prefix = nodes.prompts.next(1000)
    first, second = prefix + nodes.prompts.next(100), prefix + nodes.prompts.next(130)
    await nodes.prefill.run(first, MAX_TOKENS)
    hashes = block_hashes(prefix, BLOCK_TOKENS)
    async with asyncio.timeout(WAIT_S):
        while await nodes.directory.holders(nodes.far.blocks.namespace(), hashes) != [{nodes.far.address}] * len(hashes):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    fetched_blocks = await nodes.near.metric("fetched_blocks_total")
    ours, plain = await nodes.decode.run(second, MAX_TOKENS), await nodes.plain.run(second, MAX_TOKENS)
    assert (ours.token_ids, ours.text) == (plain.token_ids, plain.text)
    assert ours.receipt is not None
    assert ours.receipt.cached_tokens == len(hashes) * BLOCK_TOKENS == 992
    assert ours.receipt.decode_recomputed_tokens == 1130 - 992
    assert await nodes.near.metric("fetched_blocks_total") - fetched_blocks == len(hashes)


async def test_a_killed_source_store_costs_the_blocks_and_comes_back(nodes: TwoNodes) -> None:
    copies = await nodes.metric('copies_total{outcome="copied"}')
    nodes.far.signal(signal.SIGKILL)
    await nodes.far.wait()
    assert (await nodes.both(nodes.prompts.next(500))).kv_bytes_shipped == 0
    assert await nodes.metric('copies_total{outcome="copied"}') == copies
    await nodes.far.start()
    await nodes.near.connect(nodes.far)
    assert (await nodes.both(nodes.prompts.next(500))).kv_bytes_shipped == 15 * BLOCK_BYTES


@pytest.mark.parametrize("name", ["far", "near"])
async def test_a_stopped_store_costs_no_more_than_the_bound(nodes: TwoNodes, name: str) -> None:
    node = nodes.far if name == "far" else nodes.near
    recomputed_blocks = await nodes.metric("recomputed_blocks_total")
    node.signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(30.0):
            receipt = await nodes.both(nodes.prompts.next(500))
        assert receipt.kv_bytes_shipped == 0
        assert await nodes.metric("recomputed_blocks_total") - recomputed_blocks == 15
    finally:
        node.signal(signal.SIGCONT)
    await asyncio.sleep(5.5)  # the pause after a slow failure
    assert (await nodes.both(nodes.prompts.next(500))).kv_bytes_shipped == 15 * BLOCK_BYTES
