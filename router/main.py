"""The router process: reads its flags, builds its objects, serves until SIGTERM or SIGINT.

The only place that builds them. One line on stdout says that it listens, one on stderr why it cannot.
"""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from random import Random

import uvloop
from prometheus_client import CollectorRegistry, start_http_server

from router.config import RouterConfig
from router.core import RouterCore
from router.server import services
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem.errors import ConfigError, Reason
from tandem.rpc import start_server
from tandem.telemetry import RouterMetrics

_LOOPBACK = "127.0.0.1"
_EXIT_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a router; the exit code: 0 stopped by a signal, 2 a setting is wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = _config(options)
        uvloop.run(_serve(config, options.host, options.port, options.metrics_port, options.worker))
    except ConfigError as error:
        print(f"router: {error.message}", file=sys.stderr)
        return _EXIT_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router", description="Routes requests to prefill and decode workers.")
    parser.add_argument("--host", default=_LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8470, help="port to listen on, 0: any free one (default: %(default)s)")
    parser.add_argument("--worker", action="append", default=[], metavar="HOST:PORT", help="a worker's address; give one flag per worker")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of /metrics on loopback, 0: any free one (default: %(default)s)")
    for field in fields(RouterConfig):
        kind: type = int if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="default: %(default)s")
    return parser


def _config(options: argparse.Namespace) -> RouterConfig:
    config = RouterConfig(**{field.name: getattr(options, field.name) for field in fields(RouterConfig)})
    config.validate()
    for address in options.worker:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"--worker {address!r} is not HOST:PORT")
    return config


async def _serve(config: RouterConfig, host: str, port: int, metrics_port: int, addresses: Sequence[str]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    core = RouterCore(config, Random())
    shell = RouterShell(config, core, RouterMetrics(registry))
    with _metrics_server(metrics_port, registry) as bound_metrics_port:
        workers = Workers(addresses, shell, Random())
        server = await start_server(host, port, services(shell, workers, Tokenizers()))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(shell.tick_forever(), name="tick"),
                    group.create_task(workers.watch_forever(), name="workers"),
                ]
                print(f"router ready address={server.address} metrics={_LOOPBACK}:{bound_metrics_port}", flush=True)
                await stop.wait()
                await server.stop()
                for task in tasks:
                    task.cancel()
        finally:
            await server.stop(0.0)


@contextmanager
def _metrics_server(port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Serves /metrics on loopback; gives the port it got. Raises ConfigError where it is taken."""
    try:
        server, thread = start_http_server(port, addr=_LOOPBACK, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"metrics port {port} is in use or not allowed: choose another with --metrics-port", reason=Reason.PORT_IN_USE
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
