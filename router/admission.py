"""Who waits and who runs: for each model a bound on those that wait, their deadlines, and one bound on dispatched requests.

Must not order them or know replicas: `line.py` and the core do. O(log waiting) an event, list moves aside.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isclose

from tandem.domain import MAX_CHOICES, ModelId, RequestId
from tandem.errors import DeadlineError, OverloadedError

_Time = tuple[float, RequestId]


@dataclass(slots=True, kw_only=True)
class _Ticket:
    model: ModelId
    deadline_s: float
    waits_since_s: float | None = None  # None: dispatched
    work_s: float = 0.0


@dataclass(slots=True)
class _Queue:
    """Who waits for one model."""

    since: list[_Time] = field(default_factory=list)  # longest wait first
    work_s: float = 0.0


class Admission:
    """Each admitted request is either waiting or running."""

    def __init__(self, *, max_queued_requests: int, max_running_requests: int) -> None:
        self.max_queued_requests = max_queued_requests
        self.max_running_requests = max_running_requests
        self._tickets: dict[RequestId, _Ticket] = {}
        self._queues: dict[ModelId, _Queue] = {}  # of models that somebody waits for
        self._deadlines: list[_Time] = []  # of those that wait
        self._queued = 0

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""
        return self._queued

    @property
    def running_requests(self) -> int:
        """Requests that are dispatched."""
        return len(self._tickets) - self._queued

    @property
    def has_slot(self) -> bool:
        """Whether one more may be dispatched."""
        return self.running_requests < self.max_running_requests

    @property
    def models(self) -> tuple[ModelId, ...]:
        """Models that somebody waits for, by name."""
        return tuple(sorted(self._queues))

    def queued_for(self, model: ModelId) -> tuple[int, float]:
        """Requests that wait for the model, and the sum of their predicted work in seconds."""
        queue = self._queues.get(model)
        return (0, 0.0) if queue is None else (len(queue.since), queue.work_s)

    def check_room(self, model: ModelId, *, deadline_s: float | None, now_s: float, retry_after_s: Callable[[], float]) -> None:
        """Raises DeadlineError where its time is over, OverloadedError where as many wait for the model as may."""
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlineError("admission")
        queued, _ = self.queued_for(model)
        if queued >= self.max_queued_requests:
            raise OverloadedError(
                f"{queued} requests wait for model {model!r} already, the limit is max_queued_requests={self.max_queued_requests}",
                retry_after_s=retry_after_s(),
            )

    def enqueue(self, request_id: RequestId, *, model: ModelId, deadline_s: float | None, now_s: float, work_s: float) -> None:
        """A new request waits from now on; `check_room` has been asked where it may be refused."""
        self._tickets[request_id] = _Ticket(model=model, deadline_s=inf if deadline_s is None else deadline_s)
        self.wait_again(request_id, now_s=now_s, work_s=work_s)

    def waiting_since(self, model: ModelId, until_s: float) -> tuple[RequestId, ...]:
        """Who waits for the model since `until_s` or longer, longest first."""
        queue = self._queues.get(model)
        if queue is None:
            return ()
        return tuple(request_id for _, request_id in queue.since[: bisect_right(queue.since, until_s, key=_time_s)])

    def start(self, request_id: RequestId) -> None:
        """The waiting request is dispatched. Raises ValueError where it does not wait."""
        ticket = self._tickets[request_id]
        if ticket.waits_since_s is None:
            raise ValueError(f"{request_id} does not wait")
        queue = self._queues[ticket.model]
        del queue.since[bisect_left(queue.since, (ticket.waits_since_s, request_id))]
        del self._deadlines[bisect_left(self._deadlines, (ticket.deadline_s, request_id))]
        queue.work_s -= ticket.work_s
        if not queue.since:
            del self._queues[ticket.model]
        ticket.waits_since_s = None
        self._queued -= 1

    def wait_again(self, request_id: RequestId, *, now_s: float, work_s: float) -> None:
        """The running request waits for another worker; not bound by the queue's limit, for it has been admitted."""
        ticket = self._tickets[request_id]
        ticket.waits_since_s, ticket.work_s = now_s, work_s
        queue = self._queues.setdefault(ticket.model, _Queue())
        insort(queue.since, (now_s, request_id))
        insort(self._deadlines, (ticket.deadline_s, request_id))
        queue.work_s += work_s
        self._queued += 1

    def end(self, request_id: RequestId) -> None:
        """The request is over, wherever it was."""
        if self._tickets[request_id].waits_since_s is not None:
            self.start(request_id)
        del self._tickets[request_id]

    def expired(self, now_s: float) -> tuple[RequestId, ...]:
        """Waiting requests whose deadline has passed, the earliest deadline first."""
        return tuple(request_id for _, request_id in self._deadlines[: bisect_right(self._deadlines, now_s, key=_time_s)])

    def check_invariants(self) -> None:
        """Raises AssertionError where a bound, an order or a sum is broken; O(waiting)."""
        waiting = {request_id: ticket for request_id, ticket in self._tickets.items() if ticket.waits_since_s is not None}
        assert len(waiting) == self._queued, "the count of those that wait is wrong"
        assert self._deadlines == sorted((ticket.deadline_s, request_id) for request_id, ticket in waiting.items()), "deadlines are wrong"
        assert set(self._queues) == {ticket.model for ticket in waiting.values()}, "a queue is missing, or nobody is in it"
        for model, queue in self._queues.items():
            own = {request_id: ticket for request_id, ticket in waiting.items() if ticket.model == model}
            assert queue.since == sorted((ticket.waits_since_s, request_id) for request_id, ticket in own.items()), "times are wrong"
            assert isclose(queue.work_s, sum(ticket.work_s for ticket in own.values()), abs_tol=1e-6), "the work is not the sum"
            assert len(own) <= MAX_CHOICES * (self.max_queued_requests + self.max_running_requests), "more wait than may"
        assert self.running_requests <= self.max_running_requests, "more are dispatched than may be"


def _time_s(entry: _Time) -> float:
    return entry[0]
