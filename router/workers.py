"""The Watch stream and the channel of each worker: leases, loads, stamps, measured steps and cached blocks in, losses noticed.

Workers are those at fixed addresses and those the register names.

Must not choose or count: everything goes to the core through the shell.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

import grpc.aio

from router.shell import RouterShell
from tandem.convert import block_change_from_pb, lease_from_pb, load_from_pb, step_from_pb
from tandem.domain import Lease, PlannedWorker, ReplicaState, RequestId, Stamp, StampKind
from tandem.errors import ProtocolError, Reason, TandemError, UnavailableError
from tandem.rpc import ResponseStream, open_channel, open_stream, parse_answer
from tandem.v1 import worker_pb2

logger = logging.getLogger(__name__)

_WATCH = "tandem.v1.Worker/Watch"
_RECONNECT_MIN_S = 0.1
_SILENCE_SLICES = 3
_STAMP_KINDS = {
    worker_pb2.RequestStamp.KIND_ACCEPTED: StampKind.ACCEPTED,
    worker_pb2.RequestStamp.KIND_FINISHED: StampKind.FINISHED,
}


@dataclass(slots=True)
class _Link:
    address: str
    channel: grpc.aio.Channel
    lease: Lease | None = None  # the last one that came
    is_reachable: bool = False
    is_fixed: bool = True
    is_leased: bool = True  # without a lease in the register it gets no new work; its streams go on
    task: "asyncio.Task[None] | None" = None

    @property
    def routed_lease(self) -> Lease | None:
        """The lease as the core is to know it. Without one in the register it is not DRAINING: what runs there is not moved."""
        if self.lease is None or self.is_leased:
            return self.lease
        return replace(self.lease, state=ReplicaState.STARTING)


class Workers:
    """All workers of this router. Run `watch_forever` in a task; it ends only by being cancelled."""

    def __init__(
        self, addresses: Sequence[str], shell: RouterShell, rng: Random, connect: Callable[[str], grpc.aio.Channel] = open_channel
    ) -> None:
        self._shell = shell
        self._rng = rng
        self._connect = connect
        self._links = {address: _Link(address, connect(address)) for address in addresses}
        self._group: asyncio.TaskGroup | None = None

    def channel(self, worker: PlannedWorker) -> grpc.aio.Channel:
        """Where to call a planned worker. Raises UnavailableError where it is not reachable any more."""
        for link in self._links.values():
            lease = link.lease if link.is_reachable else None
            if lease is not None and (lease.replica_id, lease.incarnation) == (worker.replica_id, worker.incarnation):
                return link.channel
        raise UnavailableError(f"replica {worker.replica_id} is not reachable", reason=Reason.WORKER_LOST)

    def unreachable(self) -> list[Lease]:
        """Last leases of workers that do not answer now, and whose replicas answer nowhere else."""
        reachable = {lease.replica_id for lease in self._shell.core.fleet.leases}
        leases = [link.lease for link in self._links.values() if link.lease is not None]
        return [lease for lease in leases if lease.replica_id not in reachable]

    async def watch_forever(self) -> None:
        """Holds one Watch stream per worker; closes the channels at its end."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for link in self._links.values():
                    self._begin(link)
                await asyncio.Event().wait()
        finally:
            for link in self._links.values():
                await link.channel.close(None)

    def follow(self, addresses: Collection[str]) -> None:
        """The addresses of all replicas with a lease.

        A new one is watched. One whose lease ran out gets no new work while it answers, and is forgotten once it does not.
        """
        for address in sorted(set(addresses) - self._links.keys()):
            link = self._links[address] = _Link(address, self._connect(address), is_fixed=False)
            self._begin(link)
        for link in list(self._links.values()):
            if link.is_fixed:
                continue
            is_leased = link.address in addresses
            if is_leased != link.is_leased:
                link.is_leased = is_leased
                if link.is_reachable and link.routed_lease is not None:
                    self._shell.replica_seen(link.routed_lease)
            if not is_leased and not link.is_reachable:
                self._forget(link)

    def _begin(self, link: _Link) -> None:
        if self._group is not None:
            link.task = self._group.create_task(self._keep_watching(link), name=f"watch {link.address}")

    def _forget(self, link: _Link) -> None:
        del self._links[link.address]
        if link.task is not None and self._group is not None:
            link.task.cancel()
            self._group.create_task(link.channel.close(None), name=f"close {link.address}")

    async def _keep_watching(self, link: _Link) -> None:
        """Watches again after each loss, with a growing pause."""
        pause_s = _RECONNECT_MIN_S
        was_told = False
        while True:
            reason = "the stream ended"
            try:
                await self._watch(link)
            except TimeoutError:
                reason = f"no message for {self._shell.config.watch_silence_s:g} s"
            except TandemError as error:
                reason = error.message
            except Exception:
                logger.exception("watch_failed address=%s", link.address)
                self._shell.metrics.task_failures.labels("watch").inc()
                reason = "a bug of the router"
            was_reachable = link.is_reachable
            self._lose(link)
            if was_reachable or not was_told:
                logger.info("worker_unreachable address=%s reason=%s", link.address, reason)
                was_told = True
            pause_s = _RECONNECT_MIN_S if was_reachable else min(2 * pause_s, self._shell.config.reconnect_max_s)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    async def _watch(self, link: _Link) -> None:
        """Takes messages until the stream ends or breaks. Raises TimeoutError where it falls silent."""
        request = worker_pb2.WatchRequest(router_id=self._shell.config.router_id)
        async with open_stream(link.channel, _WATCH, request, timeout_s=None) as stream:
            while True:
                payload = await _read_within(stream, self._shell.config.watch_silence_s)
                if payload is None:
                    return
                self._take(link, parse_answer(worker_pb2.WatchResponse, payload))

    def _take(self, link: _Link, message: worker_pb2.WatchResponse) -> None:
        if message.HasField("lease"):
            self._take_lease(link, lease_from_pb(message.lease))
        if not link.is_reachable or link.lease is None:
            raise ProtocolError(f"the worker at {link.address} sent a report before its lease")
        load = load_from_pb(message.load) if message.HasField("load") else None
        stamps = [
            Stamp(request_id=RequestId(stamp.request_id), attempt=stamp.attempt, kind=_STAMP_KINDS[stamp.kind])
            for stamp in message.stamps
            if stamp.kind in _STAMP_KINDS
        ]
        self._shell.report(link.lease, message.incarnation, message.sequence, load, stamps)
        if message.steps:
            self._shell.steps(link.lease, message.incarnation, [step_from_pb(step) for step in message.steps])
        if message.block_events:
            self._shell.cached(link.lease, message.incarnation, block_change_from_pb(message.block_events))

    def _take_lease(self, link: _Link, lease: Lease) -> None:
        engine = lease.engine
        if not (lease.replica_id and lease.model and min(engine.block_size_tokens, engine.context_tokens, engine.vocabulary_tokens) > 0):
            raise ProtocolError(f"the worker at {link.address} sent a lease without replica id, model or engine limits")
        if link.lease is not None and link.lease.replica_id != lease.replica_id:
            self._lose(link)
        if not link.is_reachable:
            logger.info("replica_seen replica_id=%s incarnation=%d address=%s", lease.replica_id, lease.incarnation, link.address)
        link.lease = lease
        link.is_reachable = True
        if link.routed_lease is not None:
            self._shell.replica_seen(link.routed_lease)

    def _lose(self, link: _Link) -> None:
        if link.is_reachable and link.lease is not None:
            link.is_reachable = False
            self._shell.replica_lost(link.lease.replica_id, link.lease.incarnation)


async def _read_within(stream: ResponseStream, silence_s: float) -> bytes | None:
    """The next message. Raises TimeoutError where none comes.

    Waits in slices, so that a stall of this process's own loop counts as one slice and not as the worker's silence.
    """
    read = asyncio.create_task(stream.read(), name="watch read")
    try:
        for _ in range(_SILENCE_SLICES):
            done, _ = await asyncio.wait((read,), timeout=silence_s / _SILENCE_SLICES)
            if done:
                return read.result()
        raise TimeoutError
    finally:
        read.cancel()
