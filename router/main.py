"""The router process: reads its flags, builds its objects, serves until SIGTERM or SIGINT.

The only place that builds them. One line on stdout says that it listens, one on stderr why it cannot.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import fields
from random import Random

import uvloop
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.frontend import Frontend
from router.http import start_http
from router.http_calls import HttpCalls
from router.openai_service import OpenAiService
from router.operator_service import OperatorService, ScrapeTarget, member_targets, replica_targets
from router.register_view import RegisterView
from router.server import services
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem.errors import ConfigError
from tandem.membership import REGISTER_URL, Member, MemberKind, Register
from tandem.network import advertised_host
from tandem.registrar import Registrar
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
        uvloop.run(_serve(config, options))
    except ConfigError as error:
        print(f"router: {error.message}", file=sys.stderr)
        return _EXIT_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router", description="Routes requests to prefill and decode workers.")
    parser.add_argument("--host", default=_LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8470, help="port to listen on, 0: any free one (default: %(default)s)")
    parser.add_argument("--worker", action="append", default=[], metavar="HOST:PORT", help="a worker's address; give one flag per worker")
    parser.add_argument(
        "--redis-url",
        default=os.environ.get(REGISTER_URL, ""),
        help="the cluster's register; default: REDIS_URL, else the --worker ones only",
    )
    parser.add_argument("--http-port", type=int, default=8480, help="port of the HTTP endpoint, 0: any free one (default: %(default)s)")
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


async def _serve(config: RouterConfig, options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    core = RouterCore(config, Random())
    shell = RouterShell(config, core, RouterMetrics(registry))
    workers, tokenizers, http_calls = Workers(options.worker, shell, Random()), Tokenizers(), HttpCalls()
    frontend = Frontend(shell, workers, tokenizers)
    view = RegisterView(_register(options.redis_url, config.cluster), shell, workers) if options.redis_url else None

    def targets() -> list[ScrapeTarget]:
        if view is not None:
            return member_targets(view.snapshot.members, config.cluster)
        router = {"cluster": config.cluster, "component": "router", "router_id": config.router_id}
        return [ScrapeTarget(address=http.address, labels=router), *replica_targets(core.fleet.leases, config.cluster)]

    def why_unhealthy() -> str | None:
        is_held = any(core.fleet.is_held(model) for model in core.fleet.models)
        return None if core.fleet.leases or is_held else "no replica is reachable, and no model is to be started"

    openai = OpenAiService(shell, frontend, tokenizers, http_calls)
    operator = OperatorService(registry, why_unhealthy, targets)
    async with AsyncExitStack() as stack:
        server = await start_server(options.host, options.port, services(shell, workers, frontend, view))
        stack.push_async_callback(server.stop, 0.0)
        http = await start_http(options.host, options.http_port, [*openai.routes(), *operator.routes()], http_calls, shell.metrics)
        stack.push_async_callback(http.stop, 0.0)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(shell.tick_forever(), name="tick"),
                group.create_task(workers.watch_forever(), name="workers"),
            ]
            registering = None
            if view is not None:
                stack.push_async_callback(view.register.close)
                advertised = advertised_host(options.host)
                member = Member(
                    kind=MemberKind.ROUTER,
                    member_id=config.router_id,
                    incarnation=time.time_ns(),
                    node=socket.gethostname(),
                    pid=os.getpid(),
                    address=f"{advertised}:{server.port}",
                    http_address=f"{advertised}:{http.port}",
                    metrics_address=f"{advertised}:{http.port}",
                )
                tasks.append(group.create_task(view.run(), name="register view"))
                registering = group.create_task(Registrar(view.register, member, stop.set).run(), name="registrar")
            print(f"router ready address={server.address} http={http.address}", flush=True)
            await stop.wait()
            if registering is not None:
                registering.cancel()  # the lease goes first, so that nobody new is sent here
            await asyncio.gather(server.stop(), http.stop())
            for task in tasks:
                task.cancel()


def _register(url: str, cluster: str) -> Register:
    from tandem.redis_register import RedisRegister  # a router of fixed workers needs no redis

    return RedisRegister(url, cluster)
