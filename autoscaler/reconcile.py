"""Makes the pools what the plan wants: starts what is missing, drains what is too many, clears away what has failed.

Level-triggered: looks at what is there, never at what it did before. Must not decide how many.
"""

import asyncio
import logging
from collections.abc import Callable, Set

import grpc.aio

from autoscaler.observation import Observation, PoolKey
from autoscaler.plan import Plan, PoolDecision, choose_victims
from autoscaler.pool import PoolReplica, ReplicaNames, ReplicaPool
from tandem.domain import ModelId, ReplicaId, ReplicaState
from tandem.errors import TandemError
from tandem.rpc import call
from tandem.supervisor import SupervisedState
from tandem.v1 import worker_pb2

logger = logging.getLogger(__name__)

DRAIN_S = 60.0  # then what still runs is continued elsewhere by its routers
DRAIN_POLL_S = 0.2
_DRAIN_CALL_S = 2.0
_OVER = (SupervisedState.FAILED, SupervisedState.STOPPED)


class Reconciler:
    """One cluster's. Drains go on in tasks of `group`."""

    def __init__(
        self,
        pool: ReplicaPool,
        names: ReplicaNames,
        channel: Callable[[str], grpc.aio.Channel],
        group: asyncio.TaskGroup,
        *,
        on_start_failed: Callable[[PoolKey], None],
        drain_s: float = DRAIN_S,
        drain_poll_s: float = DRAIN_POLL_S,
    ) -> None:
        self._pool = pool
        self._names = names
        self._channel = channel
        self._group = group
        self._on_start_failed = on_start_failed
        self._drain_s = drain_s
        self._drain_poll_s = drain_poll_s
        self._leaving: dict[ReplicaId, asyncio.Task[None]] = {}
        self._failures: dict[ModelId, list[str]] = {}  # starts in a row, and what was said; none while a replica runs

    @property
    def leaving(self) -> Set[ReplicaId]:
        """Replicas on their way out."""
        return self._leaving.keys()

    @property
    def errors(self) -> dict[ModelId, str]:
        """Why a model's replicas do not start, until one does. One failure alone may be an accident."""
        return {model: words[-1] for model, words in self._failures.items() if len(words) > 1}

    def abandon(self) -> None:
        """Leaves what it was about to the next leader."""
        for task in self._leaving.values():
            task.cancel()

    async def clear(self) -> None:
        """Removes what has failed, before anything is counted."""
        replicas = list(self._pool.replicas.values())
        for replica in replicas:
            if replica.state is SupervisedState.RUNNING:
                self._failures.pop(replica.key.model, None)
        for replica in replicas:
            if replica.state in _OVER and replica.replica_id not in self._leaving:
                logger.warning("replica_cleared replica_id=%s state=%s error=%s", replica.replica_id, replica.state, replica.error)
                if replica.state is SupervisedState.FAILED:
                    self._start_failed(replica.key, replica.error)
                await self._pool.remove(replica.replica_id)

    async def converge(self, plan: Plan, observation: Observation) -> None:
        """One step towards the plan. A start that Ray refuses counts as failed."""
        for decision in plan:
            observed = observation.replicas.get(decision.key, ())
            draining = {item.replica_id for item in observed if item.state is ReplicaState.DRAINING}
            for replica_id in sorted(draining - self.leaving):
                self._leave(self._pool.replicas.get(replica_id))
            live = [item for item in observed if item.state is not ReplicaState.DRAINING]
            if len(live) < decision.replicas:
                await self._start(decision, decision.replicas - len(live))
            elif len(live) > decision.replicas and decision.may_stop:
                for replica_id in choose_victims(live, len(live) - decision.replicas):
                    self._leave(self._pool.replicas.get(replica_id))

    async def _start(self, decision: PoolDecision, count: int) -> None:
        for _ in range(count):
            replica_id = self._names.free(decision.key, self._pool.replicas, self._pool.orphans)
            logger.info("replica_start replica_id=%s reason=%s", replica_id, decision.reason)
            try:
                await self._pool.add(decision.key, replica_id)
            except TandemError as error:
                logger.warning("replica_not_started replica_id=%s error=%s", replica_id, error.message)
                self._start_failed(decision.key, error.message)
                return

    def _start_failed(self, key: PoolKey, error: str) -> None:
        self._failures[key.model] = [*self._failures.get(key.model, ())[-1:], error]
        self._on_start_failed(key)

    def _leave(self, replica: PoolReplica | None) -> None:
        if replica is None or replica.replica_id in self._leaving:
            return
        task = self._group.create_task(self._drain(replica), name=f"drain {replica.replica_id}")
        self._leaving[replica.replica_id] = task
        task.add_done_callback(lambda _: self._leaving.pop(replica.replica_id, None))

    async def _drain(self, replica: PoolReplica) -> None:
        """No new work, then the end of what runs, then the replica's."""
        logger.info("replica_drain replica_id=%s", replica.replica_id)
        try:
            async with asyncio.timeout(self._drain_s):
                while replica.address and await self._running(replica):  # noqa: ASYNC110 - another process's count
                    await asyncio.sleep(self._drain_poll_s)
        except TimeoutError:
            logger.warning("drain_cut_short replica_id=%s after_s=%g", replica.replica_id, self._drain_s)
        except TandemError as error:
            logger.warning("drain_unheard replica_id=%s error=%s", replica.replica_id, error.message)
        await self._pool.remove(replica.replica_id)
        logger.info("replica_stopped replica_id=%s", replica.replica_id)

    async def _running(self, replica: PoolReplica) -> int:
        """Tells it to take nothing new; how many requests it still has."""
        method, request = "tandem.v1.Worker/Drain", worker_pb2.DrainRequest(deadline_remaining_s=self._drain_s)
        answer = await call(self._channel(replica.address), method, request, worker_pb2.DrainResponse, timeout_s=_DRAIN_CALL_S)
        return answer.running_requests
