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
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import fields
from pathlib import Path
from random import Random

import uvloop
from prometheus_client import CollectorRegistry

from router.access import Access
from router.block_probe_library import load_probe
from router.coefficients import CoefficientPublisher, CoefficientRegister
from router.config import RouterConfig
from router.core import RouterCore
from router.event_log import encode_header
from router.event_writer import DEFAULT_LOG_BYTES, EventLogFile
from router.frontend import Frontend
from router.http import start_http
from router.http_calls import HttpCalls
from router.openai_service import OpenAiService
from router.operator_service import OperatorService, ScrapeTarget, member_targets, replica_targets
from router.prediction_facts import prediction_facts
from router.prefix_copies import PrefixCopies
from router.quota import Quotas
from router.quota_leases import QuotaLeases, QuotaServer
from router.recorder import RecordedCore, new_header
from router.register_view import RegisterView
from router.server import services
from router.share_exchange import SILENCE_S, ShareExchange, ShareServer
from router.shell import RouterShell
from router.stores import Stores
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem.config_section import read_section
from tandem.errors import ConfigError
from tandem.membership import REGISTER_URL, Member, MemberKind, Register
from tandem.network import advertised_host
from tandem.registrar import Registrar
from tandem.rpc import start_server
from tandem.telemetry import PredictionCollector, RouterMetrics
from tandem.tenancy import Tenant
from tandem.tenant_config import TENANTS_VARIABLE, tenants_from_json

_LOOPBACK = "127.0.0.1"
_EXIT_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a router; the exit code: 0 stopped by a signal, 2 a setting is wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = _config(options)
        tenants = tenants_from_json(os.environ.get(TENANTS_VARIABLE, ""))
        uvloop.run(_serve(config, tenants, options))
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
    parser.add_argument(
        "--event-log",
        type=Path,
        metavar="PATH",
        help="write every event and decision there, for `python -m router.replay`; default: nowhere",
    )
    parser.add_argument(
        "--event-log-bytes", type=int, default=DEFAULT_LOG_BYTES, help="size at which the event log ends (default: %(default)s)"
    )
    for field in fields(RouterConfig):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=_flag_type(field.default), default=field.default, help="default: %(default)s")
    return parser


def _flag_type(default: object) -> type:
    """How argparse reads a setting; a choice stays text, which `read_section` refuses with the valid ones."""
    return int if default is None else str if isinstance(default, str) else type(default)


def _config(options: argparse.Namespace) -> RouterConfig:
    config = read_section(RouterConfig, {field.name: getattr(options, field.name) for field in fields(RouterConfig)}, "")
    config.validate()
    for address in options.worker:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"--worker {address!r} is not HOST:PORT")
    return config


async def _serve(config: RouterConfig, tenants: Sequence[Tenant], options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    core, event_log = _core(config, {tenant.name: tenant.weight for tenant in tenants}, options)
    registry.register(PredictionCollector(lambda: prediction_facts(core.predictor)))
    quotas = Quotas(tenants)
    shell = RouterShell(config, core, RouterMetrics(registry), quotas=quotas)
    access = Access(tenants, shell.metrics)
    workers, tokenizers, http_calls = Workers(options.worker, shell, Random()), Tokenizers(), HttpCalls()
    frontend = Frontend(shell, workers, tokenizers)
    stores = Stores(shell, Random())
    copies = PrefixCopies(shell, stores)
    view = RegisterView(_register(options.redis_url, config.cluster), shell, workers, stores=stores) if options.redis_url else None

    def targets() -> list[ScrapeTarget]:
        if view is not None:
            return member_targets(view.snapshot.members, config.cluster)
        router = {"cluster": config.cluster, "component": "router", "router_id": config.router_id}
        return [ScrapeTarget(address=http.address, labels=router), *replica_targets(core.fleet.leases, config.cluster)]

    def routers() -> int:
        return 1 if view is None else len(view.of(MemberKind.ROUTER))

    def why_unhealthy() -> str | None:
        is_held = any(core.fleet.is_held(model) for model in core.fleet.models)
        return None if core.fleet.leases or is_held else "no replica is reachable, and no model is to be started"

    openai = OpenAiService(shell, frontend, tokenizers, http_calls)
    operator = OperatorService(registry, why_unhealthy, targets)
    async with AsyncExitStack() as stack:
        if event_log is not None:
            stack.callback(event_log.close)
        server = await start_server(options.host, options.port, services(shell, workers, frontend, view, access))
        stack.push_async_callback(server.stop, 0.0)
        routes = [*openai.routes(), *operator.routes()]
        http = await start_http(options.host, options.http_port, routes, http_calls, shell.metrics, access)
        stack.push_async_callback(http.stop, 0.0)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(shell.tick_forever(), name="tick"),
                group.create_task(workers.watch_forever(), name="workers"),
            ]
            if event_log is not None:
                tasks.append(group.create_task(event_log.write_forever(), name="event log"))
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
                tasks.append(group.create_task(stores.watch_forever(), name="stores"))
                tasks.append(group.create_task(copies.run(), name="prefix copies"))
                coefficients = _coefficients(options.redis_url, config.cluster)
                stack.push_async_callback(coefficients.close)
                publisher = CoefficientPublisher(core.predictor, coefficients, config.router_id, shell.metrics, Random())
                tasks.append(group.create_task(publisher.run(), name="coefficients"))
                registering = group.create_task(Registrar(view.register, member, stop.set).run(), name="registrar")
            if quotas.has_limits:
                server_of_quotas = _quota_server(options.redis_url, config.cluster) if options.redis_url else None
                if server_of_quotas is not None:
                    stack.push_async_callback(server_of_quotas.close)
                leases = QuotaLeases(quotas, server_of_quotas, shell.metrics, routers, Random())
                tasks.append(group.create_task(leases.run(), name="quota leases"))
            if len(tenants) > 1 and options.redis_url:
                server_of_shares = _share_server(options.redis_url, config)
                stack.push_async_callback(server_of_shares.close)
                tasks.append(group.create_task(ShareExchange(core, server_of_shares, shell.metrics, routers).run(), name="share exchange"))
            print(f"router ready address={server.address} http={http.address}", flush=True)
            await stop.wait()
            if registering is not None:
                registering.cancel()  # the lease goes first, so that nobody new is sent here
            await asyncio.gather(server.stop(), http.stop())
            for task in tasks:
                task.cancel()


def _core(config: RouterConfig, weights: Mapping[str, float], options: argparse.Namespace) -> tuple[RouterCore, EventLogFile | None]:
    if options.event_log is None:
        return RouterCore(config, Random(), weights=weights, bind_probe=load_probe()), None
    header = new_header(config, weights=weights)
    event_log = EventLogFile(options.event_log, encode_header(header), max_bytes=options.event_log_bytes)
    return RecordedCore(header, event_log), event_log


def _register(url: str, cluster: str) -> Register:
    from tandem.redis_register import RedisRegister  # a router of fixed workers needs no redis

    return RedisRegister(url, cluster)


def _coefficients(url: str, cluster: str) -> CoefficientRegister:
    from tandem.redis_coefficients import RedisCoefficients

    return RedisCoefficients(url, cluster)


def _share_server(url: str, config: RouterConfig) -> ShareServer:
    from tandem.redis_shares import RedisShares

    return RedisShares(url, config.cluster, f"{config.router_id} {uuid.uuid4().hex[:12]}", silence_s=SILENCE_S)


def _quota_server(url: str, cluster: str) -> QuotaServer:
    from tandem.redis_quota import RedisQuota

    return RedisQuota(url, cluster)
