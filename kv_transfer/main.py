"""The store service's process: reads its flags, builds its objects, serves until it is told to stop.

The only place that builds them. One line on stdout says that it listens, one on stderr why it cannot. Blocks outlive it.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry, start_http_server

from kv_transfer.copier import BlockCopier, StoreTotals
from kv_transfer.service import StoreService
from kv_transfer.shm_room import check_room
from kv_transfer.shm_store import ShmStore
from tandem.channel_pool import ChannelPool
from tandem.errors import ConfigError, Reason
from tandem.lifeline import stop_at_end
from tandem.membership import REGISTER_URL, Member, MemberKind
from tandem.polling import poll_until
from tandem.registrar import Registrar
from tandem.rpc import service, start_server
from tandem.telemetry import StoreCollector
from tandem.tether import POLL_S, Tether
from tandem.v1 import store_pb2

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_EXIT_CONFIG = 2
_MIN_CAPACITY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """One store service. `node` is the name under which its node's replicas are known."""

    store_dir: str
    capacity_bytes: int
    host: str = _LOOPBACK
    port: int = 0  # any free one
    metrics_port: int = 0
    node: str = "local"
    lifeline_fd: int | None = None
    tether: str = ""  # a lock file; the service ends when nobody has held it for a while
    address_file: str = ""  # where its address is left; a service that finds its predecessor's takes the same port
    cluster: str = ""
    redis_url: str = ""  # the register it takes a lease in; empty: none

    def validate(self) -> None:
        """Raises ConfigError naming the option."""
        if not self.store_dir:
            raise ConfigError("--store-dir must name a folder")
        if self.capacity_bytes < _MIN_CAPACITY_BYTES:
            raise ConfigError(f"--capacity-bytes must be at least {_MIN_CAPACITY_BYTES}, got {self.capacity_bytes}")
        for name, port in (("--port", self.port), ("--metrics-port", self.metrics_port)):
            if not 0 <= port <= 65_535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {port}")
        if self.lifeline_fd is not None:
            try:
                os.fstat(self.lifeline_fd)
            except OSError as error:
                raise ConfigError(f"--lifeline-fd {self.lifeline_fd} is no open descriptor") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddresses:
    """Where a running service answers, host:port each."""

    address: str
    metrics_address: str


Beside = Callable[[StoreAddresses], Coroutine[None, None, None]]


def main(arguments: Sequence[str] | None = None, beside: Beside | None = None) -> int:
    """Runs a store service; the exit code: 0 stopped, 2 a setting is wrong."""
    options = StoreOptions(**vars(_parser().parse_args(arguments)))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        options.validate()
        uvloop.run(_serve_until_told(options, beside))
    except ConfigError as error:
        print(f"store: {error.message}", file=sys.stderr)
        return _EXIT_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kv_transfer", description="Serves one node's KV blocks to other nodes.")
    parser.add_argument("--store-dir", required=True, help="folder of KV blocks that all replicas of the node share")
    parser.add_argument("--capacity-bytes", type=int, required=True, help="what the folder holds once eviction has run")
    parser.add_argument("--host", default=_LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0: any free port (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of /metrics, 0: any free one (default: %(default)s)")
    parser.add_argument("--node", default="local", help="name of the node (default: %(default)s)")
    parser.add_argument("--lifeline-fd", type=int, help="its end stops the service")
    parser.add_argument("--tether", default="", help="lock file of the supervisor; the service ends some time after nobody holds it")
    parser.add_argument("--address-file", default="", help="file its address is written to, and its port taken from where it is there")
    parser.add_argument("--cluster", default="", help="cluster whose register it joins")
    parser.add_argument("--redis-url", default=os.environ.get(REGISTER_URL, ""), help="that register; default: REDIS_URL, else none")
    return parser


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
    store = ShmStore(folder, capacity_bytes=options.capacity_bytes)
    channels, totals, registry = ChannelPool(), StoreTotals(), CollectorRegistry()
    copier = BlockCopier(store, channels, totals, evict_after_bytes=options.capacity_bytes // 16)
    served = StoreService(options.node, store, copier, totals)
    registry.register(StoreCollector(lambda: asdict(store.stats()), lambda: asdict(totals)))
    with _metrics_server(options.host, options.metrics_port, registry) as metrics_port:
        server = await start_server(options.host, options.port, {"tandem.v1.Store": service(store_pb2, "Store", served)})
        addresses = StoreAddresses(address=server.address, metrics_address=f"{options.host}:{metrics_port}")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(served.keep_room(), name="keep-room"),
                    group.create_task(served.keep_spares(), name="keep-spares"),
                ]
                if beside is not None:
                    tasks.append(group.create_task(beside(addresses), name="beside"))
                print(f"store ready address={addresses.address} metrics={addresses.metrics_address}", flush=True)
                await stop.wait()
                await server.set_serving(False)
                await server.stop()
                for task in tasks:
                    task.cancel()
        finally:
            await server.stop(0.0)
            await channels.close()
            store.close()


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
