"""Brings slices from the quota server to one router's quotas, and shows in metrics how they stand.

Must not decide what to ask for: `quota.py` does. One call at a time, each LOOK_S or so, only where something is to be asked.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from router.quota import LOOK_S, Quotas
from tandem.errors import UnavailableError
from tandem.telemetry import RouterMetrics
from tandem.tenancy import SliceAsk

logger = logging.getLogger(__name__)

_JITTER_FRACTION = 0.2  # so that no router is always the first to ask


class QuotaServer(Protocol):
    """Who grants slices: `tandem.redis_quota.RedisQuota`."""

    async def lease(self, asks: Sequence[SliceAsk], routers: int) -> list[int]:
        """What is granted of each ask; with none, only whether it answers. Raises UnavailableError."""

    async def close(self) -> None:
        """Closes connections."""


class QuotaLeases:
    """Keeps `quotas` filled. Without a server the router is alone for good. `routers` says how many share the limits now."""

    def __init__(
        self,
        quotas: Quotas,
        server: QuotaServer | None,
        metrics: RouterMetrics,
        routers: Callable[[], int],
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas = quotas
        self._server = server
        self._metrics = metrics
        self._routers = routers
        self._rng = rng
        self._clock = clock
        if server is None:
            quotas.lost()

    async def run(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("quota_look_failed")
                self._metrics.task_failures.labels("quota").inc()
            await asyncio.sleep(LOOK_S * self._rng.uniform(1.0 - _JITTER_FRACTION, 1.0 + _JITTER_FRACTION))

    async def look(self) -> None:
        """One round: what is to be asked, what came of it."""
        quotas = self._quotas
        quotas.routers = max(1, self._routers())
        asks = quotas.asks(self._clock())
        if self._server is not None and (asks or quotas.is_alone):
            await self._lease(self._server, asks)
        self._metrics.quota_is_alone.set(quotas.is_alone)

    async def _lease(self, server: QuotaServer, asks: Sequence[SliceAsk]) -> None:
        was_alone = self._quotas.is_alone
        try:
            granted = await server.lease(asks, self._quotas.routers)
        except UnavailableError as error:
            self._metrics.quota_leases.labels("failed").inc()
            self._quotas.lost()
            if not was_alone:
                logger.warning("quota_server_lost routers=%d error=%s", self._quotas.routers, error.message)
            return
        self._quotas.granted(asks, granted)
        self._metrics.quota_leases.labels("ok").inc()
        if was_alone:
            logger.info("quota_server_back")
