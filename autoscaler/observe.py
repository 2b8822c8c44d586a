"""Gathers one Observation: what the routers see, what the pool says of its replicas, what was set by hand.

Must not decide. A router or register that does not answer makes the observation incomplete, and so does one that is being filled again.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import grpc.aio

from autoscaler.observation import ModelDemand, Observation, PoolKey, ReplicaObservation
from autoscaler.pool import PoolReplica
from tandem.cluster_view import ClusterStatus, ModelQueue, ReplicaStatus, status_from_pb
from tandem.domain import ModelId, ReplicaId, ReplicaState, ReplicaTarget
from tandem.errors import TandemError
from tandem.membership import REFILL_S, Member, MemberKind, Register
from tandem.rpc import call
from tandem.supervisor import SupervisedState
from tandem.v1 import control_pb2

logger = logging.getLogger(__name__)

_ROUTER_S = 1.0
_GET_STATUS = "tandem.v1.Control/GetStatus"


class Observer:
    """Asks every router in the register. `channel` gives a channel by address."""

    def __init__(self, register: Register, channel: Callable[[str], grpc.aio.Channel], clock: Callable[[], float] = time.monotonic) -> None:
        self._register = register
        self._channel = channel
        self._clock = clock
        self._served: dict[str, Counter[ModelId]] = {}  # by router: requests so far
        self._generation = ""
        self._complete_s = -math.inf  # when the register is believed to name every router again
        self._manual: tuple[ReplicaTarget, ...] = ()
        self._manual_s = 0.0  # when they were read

    async def observe(self, replicas: Iterable[PoolReplica], leaving: Iterable[ReplicaId]) -> Observation:
        """The cluster now. `leaving` are replicas that reconcile drains."""
        try:
            snapshot = await self._register.snapshot()
            if self._generation not in ("", snapshot.generation):
                await self._restore_manual()
                self._complete_s = self._clock() + REFILL_S
            self._generation = snapshot.generation
            manual = self._manual = await self._register.manual_targets()
            self._manual_s = self._clock()
        except TandemError as error:
            logger.warning("observe_failed error=%s", error.message)
            return merge(replicas, leaving, (), (), {}, manual=(), is_complete=False)
        routers = [member for member in snapshot.members if member.kind is MemberKind.ROUTER]
        answers = await asyncio.gather(*(self._ask(router) for router in routers))
        heard = {router.member_id: answer for router, answer in zip(routers, answers, strict=True) if answer is not None}
        statuses = list(heard.values())
        queues = [queue for status in statuses for queue in status.queues]
        recent = self._recent({router_id: status.queues for router_id, status in heard.items()})
        self._served = {router.member_id: self._served[router.member_id] for router in routers if router.member_id in self._served}
        is_complete = bool(routers) and len(statuses) == len(routers) and self._clock() >= self._complete_s
        return merge(replicas, leaving, statuses, queues, recent, manual=manual, is_complete=is_complete)

    async def _restore_manual(self) -> None:
        """The register was lost: what was set by hand is written again, with the time it had left; what was set since then stays."""
        passed_s = self._clock() - self._manual_s
        newer = {(target.model, target.role) for target in await self._register.manual_targets()}
        left = [
            replace(target, expires_in_s=target.expires_in_s - passed_s if target.expires_in_s else 0.0)
            for target in self._manual
            if (target.expires_in_s == 0.0 or target.expires_in_s > passed_s) and (target.model, target.role) not in newer
        ]
        if left:
            await self._register.set_manual_targets(left)
            logger.warning("manual_targets_restored targets=%d", len(left))

    async def _ask(self, router: Member) -> ClusterStatus | None:
        try:
            message = await call(
                self._channel(router.address),
                _GET_STATUS,
                control_pb2.GetStatusRequest(),
                control_pb2.GetStatusResponse,
                timeout_s=_ROUTER_S,
            )
            return status_from_pb(message)
        except TandemError as error:
            logger.warning("router_silent router=%s error=%s", router.member_id, error.message)
            return None

    def _recent(self, heard: Mapping[str, Sequence[ModelQueue]]) -> Counter[ModelId]:
        """Requests accepted since each router was last heard, by model; a router that restarted counts from zero."""
        recent: Counter[ModelId] = Counter()
        for router_id, queues in heard.items():
            now = Counter({queue.model: queue.requests_total for queue in queues})
            before = self._served.get(router_id, now)
            self._served[router_id] = now
            for model, total in now.items():
                recent[model] += total - before[model] if total >= before[model] else total
        return recent


def merge(
    replicas: Iterable[PoolReplica],
    leaving: Iterable[ReplicaId],
    statuses: Sequence[ClusterStatus],
    queues: Sequence[ModelQueue],
    recent: Mapping[ModelId, int],
    *,
    manual: Sequence[ReplicaTarget],
    is_complete: bool,
) -> Observation:
    """One observation from everybody's words. A replica that no router has seen is still starting."""
    gone = set(leaving)
    seen: dict[ReplicaId, list[ReplicaStatus]] = {}
    for status in statuses:
        for view in status.replicas:
            if view.is_reachable:
                seen.setdefault(view.lease.replica_id, []).append(view)
    pools: dict[PoolKey, list[ReplicaObservation]] = {}
    for replica in sorted(replicas, key=lambda item: item.replica_id):
        if replica.state in (SupervisedState.FAILED, SupervisedState.STOPPED):
            continue
        views = [view for view in seen.get(replica.replica_id, []) if view.lease.incarnation == replica.incarnation]
        pools.setdefault(replica.key, []).append(_observed(replica, views, is_leaving=replica.replica_id in gone, is_blind=not statuses))
    demands: dict[ModelId, ModelDemand] = {}
    for name in {queue.model for queue in queues} | set(recent):
        mine = [queue for queue in queues if queue.model == name]
        demands[ModelId(name)] = ModelDemand(
            model=ModelId(name),
            queued_requests=sum(queue.queued_requests for queue in mine),
            queued_work_s=sum(queue.queued_work_s for queue in mine),
            recent_requests=recent.get(ModelId(name), 0),
        )
    return Observation(
        replicas={key: tuple(pool) for key, pool in pools.items()},
        demands=tuple(demands[name] for name in sorted(demands)),
        manual_targets=tuple(manual),
        is_complete=is_complete,
    )


def _observed(replica: PoolReplica, views: Sequence[ReplicaStatus], *, is_leaving: bool, is_blind: bool) -> ReplicaObservation:
    """One replica by all routers' reports of it: they tell the same totals at slightly different times, so the largest counts."""
    state = ReplicaState.STARTING
    if is_leaving or any(view.lease.state is ReplicaState.DRAINING for view in views):
        state = ReplicaState.DRAINING
    elif replica.state is SupervisedState.RUNNING and (views or is_blind):
        state = ReplicaState.READY
    return ReplicaObservation(
        replica_id=replica.replica_id,
        state=state,
        load_fraction=max((_load_fraction(view) for view in views), default=0.0),
        running_requests=max((view.load.running_requests for view in views), default=0),
        backlog_s=max((view.predicted_work_s for view in views), default=0.0),
    )


def _load_fraction(view: ReplicaStatus) -> float:
    seats = max(1, view.lease.engine.max_num_seqs)
    return min(1.0, max(view.load.running_requests / seats, view.load.kv_used_fraction))
