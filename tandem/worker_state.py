"""What one replica has accepted: totals for routers, stamps per router, and whom to wake when they change.

Used by both worker services; knows neither the engine nor gRPC. Belongs to one event loop; totals may be read in any thread.
"""

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from tandem.domain import Lease, ReplicaState, Request, RequestId
from tandem.domain import Stamp as Stamp
from tandem.domain import StampKind as StampKind
from tandem.errors import InvalidRequestError, Reason, UnavailableError
from tandem.ownership import Owner, count_unowned
from tandem.step_reservoir import StepReservoir
from tandem.step_sample import StepSample

# Stamps of a router that does not read its stream; the oldest are dropped, and the totals are right all the same.
_MAX_STAMPS = 10_000
MAX_MESSAGE_STEPS = 16  # in one message: a sample takes some 20 bytes


@dataclass(slots=True)
class Run:
    """One accepted attempt. Tokens are those of this replica's share of the work.

    `number` is its own on this replica: the same attempt may come twice, through two routers.
    """

    number: int
    prefill_tokens: int
    kv_tokens: int
    generated_tokens: int = 0
    owner: Owner = field(default_factory=Owner)


def tokens_to_compute(planned_tokens: int, request: Request) -> int:
    """Of the request's prompt, by its plan: routers count the same, so that reports and their own bookings are in one measure."""
    return min(planned_tokens or request.total_tokens, request.total_tokens)


class Watcher:
    """One router's Watch stream: what it has not been told yet."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self._changed = asyncio.Event()
        self._stamps: list[Stamp] = []
        self._steps = StepReservoir(MAX_MESSAGE_STEPS)

    async def changed(self, timeout_s: float) -> list[Stamp]:
        """Waits for a change or `timeout_s`; returns the router's stamps since the last call."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()
        stamps, self._stamps = self._stamps, []
        return stamps

    def stamp(self, stamp: Stamp) -> None:
        """Keeps a stamp for the next message."""
        self._stamps.append(stamp)
        del self._stamps[:-_MAX_STAMPS]

    def measured(self, steps: Iterable[StepSample]) -> None:
        """Keeps steps for the next message."""
        self._steps.add(steps)

    def take_steps(self) -> tuple[StepSample, ...]:
        """The steps that are to go into the next message."""
        return self._steps.take()

    def wake(self) -> None:
        """Ends the wait in `changed`."""
        self._changed.set()


class WorkerState:
    """Runs, totals and watchers of one replica."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.accepted_prefill_tokens_total = 0
        self.generated_tokens_total = 0
        self._numbers = itertools.count(1)
        self._runs: dict[int, Run] = {}
        self._watchers: list[Watcher] = []
        self.is_ending = False

    @property
    def running_requests(self) -> int:
        """Accepted attempts that have not ended."""
        return len(self._runs)

    @property
    def unowned_requests(self) -> int:
        """Accepted attempts whose call has ended: a leak."""
        return count_unowned(self._open_runs)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that accepted attempts have to compute, whose first token has not left."""
        return sum(run.prefill_tokens for run in self._open_runs)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV running attempts hold or will hold, output included."""
        return sum(run.kv_tokens + run.generated_tokens for run in self._open_runs)

    @property
    def _open_runs(self) -> tuple[Run, ...]:
        """Those there are now: metrics are read in a thread of their own."""
        return tuple(self._runs.values())

    def check(self, model: str, incarnation: int, replica_id: str = "", namespace: str = "") -> None:
        """Raises UnavailableError where this replica is not the one meant, or takes no new work; InvalidRequestError for another model.

        An incarnation of 0, an empty id and an empty namespace of blocks mean any.
        """
        own = self.lease
        if replica_id not in ("", own.replica_id):
            raise UnavailableError(f"this is {own.replica_id}, not {replica_id}", reason=Reason.STALE_INCARNATION)
        if incarnation not in (0, own.incarnation):
            raise UnavailableError(f"{own.replica_id} is incarnation {own.incarnation}, not {incarnation}", reason=Reason.STALE_INCARNATION)
        if namespace not in ("", own.namespace):
            raise UnavailableError(f"{own.replica_id} has blocks of {own.namespace}, not of {namespace}", reason=Reason.STALE_INCARNATION)
        if model != own.model:
            raise InvalidRequestError("model", f"{own.replica_id} serves {own.model!r}, not {model!r}")
        if self.lease.state is ReplicaState.DRAINING:
            raise UnavailableError(f"{self.lease.replica_id} is draining", reason=Reason.DRAINING)

    @contextmanager
    def accept(self, router_id: str, request_id: str, attempt: int, *, prefill_tokens: int, kv_tokens: int) -> Iterator[Run]:
        """Books an attempt for as long as the context lasts."""
        run = Run(number=next(self._numbers), prefill_tokens=prefill_tokens, kv_tokens=kv_tokens)
        self.accepted_prefill_tokens_total += prefill_tokens
        self._runs[run.number] = run
        self._stamp(router_id, Stamp(request_id=RequestId(request_id), attempt=attempt, kind=StampKind.ACCEPTED))
        try:
            yield run
        finally:
            del self._runs[run.number]
            self._stamp(router_id, Stamp(request_id=RequestId(request_id), attempt=attempt, kind=StampKind.FINISHED))

    def must_prefill(self, run: Run, prefill_tokens: int) -> None:
        """The attempt's prompt is computed here after all."""
        self.accepted_prefill_tokens_total += prefill_tokens - run.prefill_tokens
        run.prefill_tokens = prefill_tokens
        self._wake()

    def prefilled(self, run: Run) -> None:
        """The first token of the attempt has left."""
        run.prefill_tokens = 0
        self._wake()

    def generated(self, run: Run, tokens: int) -> None:
        """Tokens left this replica."""
        run.generated_tokens += tokens
        self.generated_tokens_total += tokens

    def measured(self, steps: Sequence[StepSample]) -> None:
        """The engine measured these steps: every router is told of them with its next message, which they do not hasten."""
        for watcher in self._watchers:
            watcher.measured(steps)

    def set_addresses(self, address: str, metrics_address: str) -> None:
        """The server's addresses, known once it listens."""
        self.lease = replace(self.lease, address=address, metrics_address=metrics_address)
        self._wake()

    def drain(self) -> None:
        """Takes no new work from now on."""
        self.lease = replace(self.lease, state=ReplicaState.DRAINING)
        self._wake()

    def end(self) -> None:
        """Takes no new work, and has Watch streams end with what runs: a server waits for them when it stops."""
        self.is_ending = True
        self.drain()

    @contextmanager
    def watch(self, router_id: str) -> Iterator[Watcher]:
        """A router listens for as long as the context lasts; one that comes back may do so before its old stream has ended."""
        watcher = Watcher(router_id)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def _stamp(self, router_id: str, stamp: Stamp) -> None:
        for watcher in self._watchers:
            if watcher.router_id == router_id:
                watcher.stamp(stamp)
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.wake()
