"""Publishes the step-time coefficients that this router has learnt, for the autoscaler to size pools with.

Must not learn them: `predict.py` does. One small write every few seconds, and none where nothing has changed for less than RENEW_S.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from router.predict import LoadPredictor
from tandem.domain import ModelId, Role
from tandem.errors import UnavailableError
from tandem.step_coefficients import PoolCoefficients
from tandem.telemetry import RouterMetrics

logger = logging.getLogger(__name__)

RENEW_S = 10.0  # of what has not changed: a third of its life in the register
_LOOK_S = 5.0
_JITTER_FRACTION = 0.2  # so that routers which start together do not write together


class CoefficientRegister(Protocol):
    """Where they go: `tandem.redis_coefficients.RedisCoefficients`."""

    async def publish(self, router_id: str, pools: Sequence[PoolCoefficients]) -> None:
        """What that router has learnt. Raises UnavailableError."""

    async def close(self) -> None:
        """Closes connections."""


def learnt(predictor: LoadPredictor) -> tuple[PoolCoefficients, ...]:
    """Of every pool that has sent enough steps; what its own do not tell is its siblings', as in predictions."""
    return tuple(
        PoolCoefficients(
            model=ModelId(report.pool.model),
            hardware=report.pool.hardware,
            role=Role(report.pool.role),
            cost=report.filled,
            p90_ratio=report.p90_ratio,
            samples=report.observations,
        )
        for report in predictor.pools.reports()
        if report.is_ready
    )


class CoefficientPublisher:
    """Run `run` in a task. While the register is away nothing is written; it is logged when it goes and when it is back."""

    def __init__(
        self,
        predictor: LoadPredictor,
        register: CoefficientRegister,
        router_id: str,
        metrics: RouterMetrics,
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predictor = predictor
        self._register = register
        self._router_id = router_id
        self._metrics = metrics
        self._rng = rng
        self._clock = clock
        self._written: tuple[PoolCoefficients, ...] = ()
        self._written_s = -math.inf
        self._is_lost = False

    async def run(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("coefficients_failed")
                self._metrics.task_failures.labels("coefficients").inc()
            await asyncio.sleep(_LOOK_S * self._rng.uniform(1.0 - _JITTER_FRACTION, 1.0 + _JITTER_FRACTION))

    async def look(self) -> None:
        """One round: writes what has changed, or would soon run out."""
        pools, now_s = learnt(self._predictor), self._clock()
        if not pools or (pools == self._written and now_s - self._written_s < RENEW_S):
            return
        try:
            await self._register.publish(self._router_id, pools)
        except UnavailableError as error:
            if not self._is_lost:
                self._is_lost = True
                logger.warning("coefficients_not_published error=%s", error.message)
            return
        self._written, self._written_s = pools, now_s
        if self._is_lost:
            self._is_lost = False
            logger.info("coefficients_published_again pools=%d", len(pools))
