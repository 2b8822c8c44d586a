"""What operators ask over HTTP: /health, /metrics, /sd (Prometheus' HTTP service discovery) and /version.

Must not know where its answers come from: callables give them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tandem import __version__
from tandem.domain import Lease
from tandem.membership import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapeTarget:
    """One process that serves /metrics at `address`, and what its series are to be labelled with."""

    address: str
    labels: Mapping[str, str] = field(default_factory=dict)


def replica_targets(leases: Sequence[Lease], cluster: str) -> list[ScrapeTarget]:
    """The replicas that say where their metrics are."""
    return [
        ScrapeTarget(
            address=lease.metrics_address,
            labels={
                "cluster": cluster,
                "component": "replica",
                "role": lease.role.value,
                "model": lease.model,
                "replica_id": lease.replica_id,
                "node": lease.node,
            },
        )
        for lease in leases
        if lease.metrics_address
    ]


def member_targets(members: Sequence[Member], cluster: str) -> list[ScrapeTarget]:
    """Every member of the register that says where its metrics are."""
    return [
        ScrapeTarget(
            address=member.metrics_address,
            labels={
                "cluster": cluster,
                "component": member.kind.value,
                f"{member.kind.value}_id": member.member_id,
                **{name: value for name, value in (("role", member.role), ("model", member.model), ("node", member.node)) if value},
            },
        )
        for member in members
        if member.metrics_address
    ]


class OperatorService:
    """`why_unhealthy` answers None where requests can be served or may wait; `targets` answers what there is to scrape."""

    def __init__(
        self, registry: CollectorRegistry, why_unhealthy: Callable[[], str | None], targets: Callable[[], Sequence[ScrapeTarget]]
    ) -> None:
        self._registry = registry
        self._why_unhealthy = why_unhealthy
        self._targets = targets

    def routes(self) -> list[web.RouteDef]:
        """For the application; each answers HEAD too."""
        return [
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/sd", self.discovery),
            web.get("/version", self.version),
        ]

    async def health(self, request: web.Request) -> web.Response:
        """200, or 503 with the reason."""
        reason = self._why_unhealthy()
        if reason is None:
            return _json({"status": "ok"})
        return _json({"status": "unavailable", "reason": reason}, status=503, headers={"Retry-After": "1"})

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text, or OpenMetrics where it is asked for; made in a thread."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = await asyncio.to_thread(encode, self._registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def discovery(self, request: web.Request) -> web.Response:
        """Each target as a group of its own."""
        return _json([{"targets": [target.address], "labels": dict(target.labels)} for target in self._targets()])

    async def version(self, request: web.Request) -> web.Response:
        """Tandem's version."""
        return _json({"version": __version__})


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers)
