"""Tells the other routers what this one served its tenants, and the core what they served: fair shares hold across routers.

Must not decide who goes first: `tenants.py` does. One call at a time; without an answer each router keeps the shares by itself.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from router.core import RouterCore
from router.tenants import RouterShares
from tandem.errors import UnavailableError
from tandem.telemetry import RouterMetrics

logger = logging.getLogger(__name__)

EXCHANGE_S = 0.25
SILENCE_S = 2.0  # after it a router's tenants wait there no more


class ShareServer(Protocol):
    """Who passes it on: `tandem.redis_shares.RedisShares`."""

    async def exchange(self, told: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
        """Tells, and answers what the others told. Raises UnavailableError."""

    async def close(self) -> None:
        """Closes connections."""


class ShareExchange:
    """Runs while there are several routers (`routers` counts them)."""

    def __init__(self, core: RouterCore, server: ShareServer, metrics: RouterMetrics, routers: Callable[[], int]) -> None:
        self._core = core
        self._server = server
        self._metrics = metrics
        self._routers = routers
        self._is_lost = False
        self._has_others = False

    async def run(self) -> None:
        """Exchanges again and again, until cancelled."""
        while True:
            try:
                await self.exchange()
            except Exception:
                logger.exception("share_exchange_failed")
                self._metrics.task_failures.labels("shares").inc()
            await asyncio.sleep(EXCHANGE_S)

    async def exchange(self) -> None:
        """One round."""
        others: dict[str, RouterShares] = {}
        if self._routers() > 1:
            own = self._core.shares()
            try:
                told = await self._server.exchange(msgspec.to_builtins(own))
            except UnavailableError as error:
                if not self._is_lost:
                    logger.warning("share_exchange_lost error=%s", error.message)
                self._is_lost = True
            else:
                self._is_lost = False
                others = {name: shares for name, value in told.items() if (shares := read_shares(value)) is not None}
        if others or self._has_others:
            self._core.shares_heard(others)
        self._has_others = bool(others)


def read_shares(value: Mapping[str, object]) -> RouterShares | None:
    """None where it is not what a router tells."""
    try:
        shares = msgspec.convert(value, RouterShares)
    except msgspec.ValidationError:
        return None
    return shares if all(map(math.isfinite, (*shares.served.values(), *shares.counters.values(), shares.floor))) else None
