"""The router's HTTP endpoint in front of fake workers, and a client that sends what it is told to."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry

from router.access import Access
from router.config import RouterConfig
from router.http import HttpServer, start_http
from router.http_calls import HttpCalls
from router.openai_service import OpenAiService
from router.operator_service import OperatorService, replica_targets
from router.tokenizer import Tokenizers
from tandem.telemetry import RouterMetrics
from tandem.tenancy import Tenant
from tests.integration.fake_worker import FakeWorker, Faults, serve_workers
from tests.integration.router_shell import CONFIG, Router, serve_router

PROMPT = [1, 2, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The stream's objects; "[DONE]" as it is."""
        lines = self.body.decode().split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRouter:
    """The router under test."""

    router: Router
    server: HttpServer
    session: aiohttp.ClientSession
    workers: dict[str, FakeWorker]

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, f"http://{self.server.address}{path}", **options) as response:
            return Answer(status=response.status, headers=response.headers, body=await response.read())

    async def complete(self, headers: Mapping[str, str] | None = None, **body: Any) -> Answer:
        """POST /v1/completions of a prompt of three token ids."""
        return await self.ask("POST", "/v1/completions", json={"prompt": PROMPT, **body}, headers=headers)


@asynccontextmanager
async def serve_http(
    config: RouterConfig = CONFIG, *, is_waiting: bool = True, tenants: Sequence[Tenant] = (), **faults: Faults
) -> AsyncIterator[HttpRouter]:
    """A router with HTTP in front of one fake worker per keyword ("prefill_0", "decode_0")."""
    async with serve_workers(**faults) as workers, serve_http_over(workers, config, is_waiting=is_waiting, tenants=tenants) as http:
        yield http


@asynccontextmanager
async def serve_http_over(
    workers: dict[str, FakeWorker], config: RouterConfig, *, is_waiting: bool = True, tenants: Sequence[Tenant] = ()
) -> AsyncIterator[HttpRouter]:
    """The same in front of workers that are there."""
    async with serve_router(workers, config, is_waiting=is_waiting, tenants=tenants) as router:
        fleet, calls = router.shell.core.fleet, HttpCalls()
        openai = OpenAiService(router.shell, router.frontend, Tokenizers(), calls)
        operator = OperatorService(
            router.registry, lambda: None if fleet.leases else "no replica is reachable", lambda: replica_targets(fleet.leases, "c")
        )
        routes, metrics = [*openai.routes(), *operator.routes()], router.shell.metrics
        server = await start_http("127.0.0.1", 0, routes, calls, metrics, Access(tenants, metrics))
        try:
            async with aiohttp.ClientSession() as session:
                yield HttpRouter(router=router, server=server, session=session, workers=workers)
        finally:
            await server.stop(0.0)


@asynccontextmanager
async def serving(*routes: web.RouteDef, registry: CollectorRegistry | None = None) -> AsyncIterator[str]:
    """The HTTP server with routes of the test's own; where it listens. `registry`: of its metrics."""
    server = await start_http("127.0.0.1", 0, routes, HttpCalls(), RouterMetrics(registry or CollectorRegistry()))
    try:
        yield server.address
    finally:
        await server.stop(0.0)
