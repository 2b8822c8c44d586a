"""What one replica has accepted: totals for routers, stamps per router, and whom to wake when they change.

Used by both worker services; knows neither the engine nor gRPC. Belongs to one event loop.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tandem.domain import Lease, ReplicaState
from tandem.errors import Reason, UnavailableError

# Stamps of a router that does not listen; the oldest are dropped, and the router learns the totals when it comes back.
_MAX_STAMPS = 10_000


class StampKind(StrEnum):
    """What happened to a router's request."""

    ACCEPTED = "accepted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """One event of one attempt at a request."""

    request_id: str
    attempt: int
    kind: StampKind


@dataclass(slots=True)
class Run:
    """One accepted attempt. Tokens are those of this replica's share of the work."""

    prefill_tokens: int
    kv_tokens: int
    generated_tokens: int = 0


@dataclass(slots=True)
class _Watcher:
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stamps: list[Stamp] = field(default_factory=list)


class WorkerState:
    """Runs, totals and watchers of one replica."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.generated_tokens_total = 0
        self._by_id: dict[int, Run] = {}
        self._watchers: dict[str, _Watcher] = {}

    @property
    def running_requests(self) -> int:
        """Accepted attempts that have not ended."""
        return len(self._by_id)

    @property
    def pending_prefill_tokens(self) -> int:
        """Accepted prompt tokens whose first token has not left."""
        return sum(run.prefill_tokens for run in self._by_id.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV running attempts hold or will hold."""
        return sum(run.kv_tokens for run in self._by_id.values())

    def check(self, incarnation: int) -> None:
        """Raises UnavailableError where this replica is not the one meant, or takes no new work."""
        if incarnation not in (0, self.lease.incarnation):
            raise UnavailableError(
                f"{self.lease.replica_id} is incarnation {self.lease.incarnation}, not {incarnation}", reason=Reason.STALE_INCARNATION
            )
        if self.lease.state is ReplicaState.DRAINING:
            raise UnavailableError(f"{self.lease.replica_id} is draining", reason=Reason.DRAINING)

    @contextmanager
    def accept(self, router_id: str, request_id: str, attempt: int, *, prefill_tokens: int, kv_tokens: int) -> Iterator[Run]:
        """Books an attempt for as long as the context lasts."""
        run = Run(prefill_tokens=prefill_tokens, kv_tokens=kv_tokens)
        self._by_id[id(run)] = run
        self._stamp(router_id, Stamp(request_id=request_id, attempt=attempt, kind=StampKind.ACCEPTED))
        try:
            yield run
        finally:
            del self._by_id[id(run)]
            self._stamp(router_id, Stamp(request_id=request_id, attempt=attempt, kind=StampKind.FINISHED))

    def prefilled(self, run: Run) -> None:
        """The first token of the attempt has left."""
        run.prefill_tokens = 0
        self._wake()

    def generated(self, run: Run, tokens: int) -> None:
        """Tokens left this replica."""
        run.generated_tokens += tokens
        self.generated_tokens_total += tokens

    def set_addresses(self, address: str, metrics_address: str) -> None:
        """The server's addresses, known once it listens."""
        self.lease = replace(self.lease, address=address, metrics_address=metrics_address)
        self._wake()

    def drain(self) -> None:
        """Takes no new work from now on."""
        self.lease = replace(self.lease, state=ReplicaState.DRAINING)
        self._wake()

    def watch(self, router_id: str) -> None:
        """A router listens; its stamps are kept from here on."""
        self._watchers.setdefault(router_id, _Watcher())

    def unwatch(self, router_id: str) -> None:
        """A router stopped listening."""
        self._watchers.pop(router_id, None)

    async def changed(self, router_id: str, timeout_s: float) -> list[Stamp]:
        """Waits for a change or `timeout_s`; returns this router's stamps since the last call."""
        watcher = self._watchers[router_id]
        try:
            async with asyncio.timeout(timeout_s):
                await watcher.changed.wait()
        except TimeoutError:
            pass
        watcher.changed.clear()
        stamps, watcher.stamps = watcher.stamps, []
        return stamps

    def _stamp(self, router_id: str, stamp: Stamp) -> None:
        watcher = self._watchers.get(router_id)
        if watcher is not None:
            watcher.stamps.append(stamp)
            del watcher.stamps[:-_MAX_STAMPS]
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers.values():
            watcher.changed.set()
