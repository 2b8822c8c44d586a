"""The store service's process: reads its flags, builds its objects, serves until it is told to stop.

The only place that builds them. One line on stdout says that it listens, one on stderr why it cannot. Blocks outlive it.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry, start_http_server

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copier import BlockCopier
from kv_transfer.holdings import Holdings
from kv_transfer.peer_server import PeerServer
from kv_transfer.prefetcher import Prefetcher
from kv_transfer.service import StoreService
from kv_transfer.shm_room import check_room
from kv_transfer.store_options import StoreOptions, options_parser
from kv_transfer.store_totals import StoreTotals
from kv_transfer.tiered_store import LowerStore, TieredStore
from tandem.channel_pool import ChannelPool
from tandem.errors import ConfigError, Reason, TandemError
from tandem.lifeline import stop_at_end
from tandem.membership import Member, MemberKind
from tandem.polling import poll_until
from tandem.registrar import Registrar
from tandem.rpc import service, start_server
from tandem.telemetry import StoreCollector
from tandem.tether import POLL_S, Tether
from tandem.v1 import store_pb2

logger = logging.getLogger(__name__)

_EXIT_CONFIG = 2
_KV_REDIS_S = 0.5  # for one batch of blocks
_WITHDRAW_S = 1.0  # at the end, for the directory; it forgets by itself
_FLUSH_S = 5.0  # at the end, for what is worth keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddresses:
    """Where a running service answers, host:port each."""

    address: str
    metrics_address: str


Beside = Callable[[StoreAddresses], Coroutine[None, None, None]]


def main(arguments: Sequence[str] | None = None, beside: Beside | None = None) -> int:
    """Runs a store service; the exit code: 0 stopped, 2 a setting is wrong."""
    options = StoreOptions(**vars(options_parser().parse_args(arguments)))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        options.validate()
        uvloop.run(_serve_until_told(options, beside))
    except ConfigError as error:
        print(f"store: {error.message}", file=sys.stderr)
        return _EXIT_CONFIG
    return 0


async def _serve_until_told(options: StoreOptions, beside: Beside | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.lifeline_fd is not None:
        stop_at_end(options.lifeline_fd, stop)

    async def beside_it(addresses: StoreAddresses) -> None:
        async with asyncio.TaskGroup() as group:
            if options.tether:
                group.create_task(_watch_tether(Tether(Path(options.tether)), stop), name="tether")
            group.create_task((beside or _announcer(options, stop))(addresses), name="announce")

    # Not under the task group: what cannot be used is said in one line, not in a group of errors.
    last = _with_last_port(options)
    try:
        await serve(last, stop, beside_it)
    except ConfigError as error:
        if last == options or error.reason is not Reason.PORT_IN_USE:
            raise
        logger.warning("last_port_not_free port=%d error=%s", last.port, error.message)
        await serve(options, stop, beside_it)


async def _watch_tether(tether: Tether, stop: asyncio.Event) -> None:
    await poll_until(tether.is_cut, POLL_S)
    stop.set()


def _with_last_port(options: StoreOptions) -> StoreOptions:
    """A service that comes back keeps its port where it is still free: replicas and other nodes know it."""
    try:
        port = int(Path(options.address_file).read_text().rpartition(":")[2]) if options.address_file else 0
    except (OSError, ValueError):
        port = 0
    return replace(options, port=options.port or port)


def _announcer(options: StoreOptions, stop: asyncio.Event) -> Beside:
    """What tells others where the service is: its address file, its lease."""

    async def announce(addresses: StoreAddresses) -> None:
        if options.address_file:
            path = Path(options.address_file)
            path.with_suffix(".tmp").write_text(addresses.address)
            os.replace(path.with_suffix(".tmp"), path)
        if not options.redis_url:
            return
        from tandem.redis_register import RedisRegister  # not needed where there is no register

        register = RedisRegister(options.redis_url, options.cluster)
        member = Member(
            kind=MemberKind.STORE,
            member_id=f"store-{options.node}",
            incarnation=time.time_ns(),
            node=options.node,
            pid=os.getpid(),
            address=addresses.address,
            metrics_address=addresses.metrics_address,
        )
        try:
            await Registrar(register, member, stop.set).run()
        finally:
            await register.close()

    return announce


async def serve(options: StoreOptions, stop: asyncio.Event, beside: Beside | None = None) -> None:
    """Serves until `stop`, then lets running calls end within 2 s. `beside` runs as long as it serves, then is cancelled.

    Prints `store ready address=... metrics=...` once it listens. Raises ConfigError where a folder or port cannot be used.
    """
    folder = Path(options.store_dir)
    check_room(folder)
    totals, registry = StoreTotals(), CollectorRegistry()
    with ExitStack() as stack:
        store = stack.enter_context(closing(ArenaStore(folder, capacity_bytes=options.capacity_bytes)))
        store.quotas.tenant_bytes = options.tenant_bytes
        await asyncio.to_thread(store.upkeep.repair)
        tiers = stack.enter_context(closing(TieredStore(store, _open_lower_tiers(options))))
        loop, needs_room = asyncio.get_running_loop(), asyncio.Event()
        peers = PeerServer(store, totals, folder, options.host, on_published=lambda: loop.call_soon_threadsafe(needs_room.set))
        stack.enter_context(closing(peers))
        channels = ChannelPool()
        copier = stack.enter_context(closing(BlockCopier(store, channels, totals)))
        prefetcher = Prefetcher(store, tiers, copier)
        served = StoreService(options.node, store, tiers, copier, prefetcher, totals, peer_port=peers.port, needs_room=needs_room)
        registry.register(
            StoreCollector(
                lambda: asdict(store.stats()) | asdict(store.upkeep.census()), lambda: asdict(totals), lambda: _tier_values(tiers)
            )
        )
        metrics_port = stack.enter_context(_metrics_server(options.host, options.metrics_port, registry))
        server = await start_server(options.host, options.port, {"tandem.v1.Store": service(store_pb2, "Store", served)})
        addresses = StoreAddresses(address=server.address, metrics_address=f"{options.host}:{metrics_port}")
        try:
            async with _shared(options, store, prefetcher, addresses.address), asyncio.TaskGroup() as group:
                tasks = [group.create_task(served.keep_room(), name="keep-room")]
                if beside is not None:
                    tasks.append(group.create_task(beside(addresses), name="beside"))
                print(f"store ready address={addresses.address} metrics={addresses.metrics_address}", flush=True)
                await stop.wait()
                served.end()
                await server.set_serving(False)
                await server.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.to_thread(tiers.flush, _FLUSH_S)
        finally:
            await server.stop(0.0)
            await channels.close()


@asynccontextmanager
async def _shared(options: StoreOptions, store: ArenaStore, prefetcher: Prefetcher, address: str) -> AsyncIterator[None]:
    """Offers this node's blocks in the cluster's directory, and has the prefetcher look there; nothing where it is not shared."""
    if not (options.is_shared and options.redis_url):
        yield
        return
    from kv_transfer.redis_directory import RedisDirectory  # not needed where there is no register

    directory = RedisDirectory(options.redis_url, options.cluster)
    prefetcher.set_directory(directory, address)
    holdings = Holdings(store.arena, directory, address)
    telling = asyncio.create_task(holdings.run(), name="holdings")
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        with suppress(TandemError, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await holdings.withdraw()
            await directory.close()


def _tier_values(tiers: TieredStore) -> dict[str, dict[str, int]]:
    """For metrics, by tier and name."""
    return {
        name: {
            **{key: getattr(tier.stats, key) for key in ("used_bytes", "capacity_bytes", "blocks")},
            **{key: getattr(tier, key) for key in ("promoted_blocks", "demoted_blocks", "corrupt_blocks")},
            "up": int(not tier.error),
        }
        for name, tier in tiers.stats().items()
    }


def _open_lower_tiers(options: StoreOptions) -> dict[str, LowerStore]:
    """By name, what outlives the cluster first. Raises ConfigError."""
    tiers: dict[str, LowerStore] = {}
    if options.disk_dir:
        from kv_transfer.disk_store import DiskStore

        tiers["disk"] = DiskStore(Path(options.disk_dir), capacity_bytes=options.disk_capacity_bytes)
    if options.kv_redis_url:
        from kv_transfer.kv_redis_store import KvRedisStore  # not needed where there is none

        tiers["redis"] = KvRedisStore(options.kv_redis_url, cluster=options.cluster, timeout_s=_KV_REDIS_S)
    return tiers


@contextmanager
def _metrics_server(host: str, port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Serves /metrics; gives the port it got. Raises ConfigError where it is taken."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"metrics port {port} on {host} is in use or not allowed: choose another with --metrics-port", reason=Reason.PORT_IN_USE
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
