"""Who waits and who runs: a bounded queue by priority, then arrival, and a bound on dispatched requests.

Must not know replicas: the core asks in what order to place and says what it placed.
"""

from bisect import insort
from dataclasses import dataclass

from tandem.domain import RequestId
from tandem.errors import DeadlineError, OverloadedError

Rank = tuple[int, int, RequestId]  # priority (lower first), arrival number, id


@dataclass(slots=True)
class _Ticket:
    rank: Rank
    deadline_s: float | None


class Admission:
    """Each admitted request is either waiting or running; a retried one waits again at its old rank."""

    def __init__(self, *, max_queued_requests: int, max_running_requests: int) -> None:
        self.max_queued_requests = max_queued_requests
        self.max_running_requests = max_running_requests
        self._tickets: dict[RequestId, _Ticket] = {}
        self._queue: list[Rank] = []
        self._arrivals = 0

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def running_requests(self) -> int:
        """Requests that are dispatched."""
        return len(self._tickets) - len(self._queue)

    @property
    def has_slot(self) -> bool:
        """Whether one more may be dispatched."""
        return self.running_requests < self.max_running_requests

    def enqueue(self, request_id: RequestId, *, priority: int, deadline_s: float | None, now_s: float, retry_after_s: float) -> None:
        """Admits a request, O(queue). Raises DeadlineError where its time is over, OverloadedError where the queue is full."""
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlineError("admission")
        if len(self._queue) >= self.max_queued_requests:
            raise OverloadedError(
                f"{len(self._queue)} requests wait already, the limit is max_queued_requests={self.max_queued_requests}",
                retry_after_s=retry_after_s,
            )
        self._arrivals += 1
        ticket = _Ticket((priority, self._arrivals, request_id), deadline_s)
        self._tickets[request_id] = ticket
        insort(self._queue, ticket.rank)

    def waiting(self) -> tuple[RequestId, ...]:
        """Waiting requests, first in line first."""
        return tuple(request_id for _, _, request_id in self._queue)

    def start(self, request_id: RequestId) -> None:
        """The waiting request is dispatched. Raises ValueError where it does not wait."""
        self._queue.remove(self._tickets[request_id].rank)

    def wait_again(self, request_id: RequestId) -> None:
        """The running request waits for another worker, at its old rank; not bound by the queue's limit, for it has been admitted."""
        insort(self._queue, self._tickets[request_id].rank)

    def end(self, request_id: RequestId) -> None:
        """The request is over, wherever it was."""
        ticket = self._tickets.pop(request_id)
        if ticket.rank in self._queue:
            self._queue.remove(ticket.rank)

    def expired(self, now_s: float) -> list[RequestId]:
        """Waiting requests whose deadline has passed, in line order."""
        over = []
        for _, _, request_id in self._queue:
            deadline_s = self._tickets[request_id].deadline_s
            if deadline_s is not None and deadline_s <= now_s:
                over.append(request_id)
        return over

    def check_invariants(self) -> None:
        """Raises AssertionError where a bound or the order is broken."""
        assert self._queue == sorted(self._queue), "the queue is out of order"
        assert len(set(self._queue)) == len(self._queue), "a request waits twice"
        assert all(self._tickets[rank[2]].rank == rank for rank in self._queue), "a request waits that was not admitted"
        assert self.running_requests <= self.max_running_requests, "more are dispatched than may be"
        assert len(self._queue) <= self.max_queued_requests + self.max_running_requests, "more wait than may"
