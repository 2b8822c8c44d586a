"""Whose turn it is: waiting requests in the lines of the workers chosen for them, and who of a line may go now.

Must not book, refuse or dispatch: the core does, and says here who has left.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from router.backlog import Backlog
from router.config import QueueOrder, RouterConfig
from router.estimator import pool_of
from router.fleet import Fleet
from router.line import Shares, Waiting
from router.lines import Lines
from router.placement import Assignment, Placement
from router.planner import Planner
from router.predict import LoadPredictor
from router.tracked import Tracked
from tandem.domain import Lease, ModelId, ReplicaId, RequestId

_BEGUN_PRIORITY = -(2**31)  # of requests that go on after tokens: their clients are reading
_RETHINK_S = 1.0  # beyond the wait that was predicted: then it may be quicker elsewhere by now
_RETHOUGHT_AT_ONCE = 8  # in a tick: each is a decision
_RESERVE_AFTER_S = 5.0  # for so long smaller ones may pass one that finds no room


@dataclass(frozen=True, slots=True)
class Turn:
    """A request whose turn has come, and where it runs; None: too late for its objective, and it may be shed."""

    tracked: Tracked
    placement: Placement | None


class Turns:
    """Lines, and what keeps their first from going. `requests` is the core's, to read."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        planner: Planner,
        lines: Lines,
        shares: Shares,
        requests: Mapping[RequestId, Tracked],
        backlog: Backlog,
        predictor: LoadPredictor,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._planner = planner
        self._lines = lines
        self._shares = shares
        self._requests = requests
        self._backlog = backlog
        self._predictor = predictor
        self._stuck: dict[ReplicaId, None] = {}  # lines whose first found no slot, or no decode worker with room
        self._reserved: dict[ModelId, tuple[RequestId, ReplicaId]] = {}  # a decode worker that only that request may join

    def line_up(self, tracked: Tracked, assignment: Assignment | None, now_s: float) -> float:
        """The request waits from now on, in the line of the worker chosen for it or without one.

        What has begun goes before all else. Answers the seconds of its prefill.
        """
        request, config = tracked.request, self._config
        tracked.assignment = assignment
        if tracked.first_assignment is None:
            tracked.first_assignment = assignment
        tracked.rethink_s = now_s + _RETHINK_S + (0.0 if assignment is None else assignment.ahead_s)
        own_s = self._planner.alone_s(tracked) if assignment is None else assignment.own_s
        work_s = own_s if assignment is None else assignment.work_s
        latest_start_s = tracked.first_token_due_s - own_s
        is_shortest = config.queue_order is QueueOrder.SHORTEST
        waiting = Waiting(
            request_id=request.request_id,
            tenant=request.tenant,
            priority=_BEGUN_PRIORITY if tracked.has_output else request.priority,
            arrival=tracked.arrival,
            latest_start_s=latest_start_s,
            rank_s=own_s + config.queue_ageing * tracked.arrived_s if is_shortest else latest_start_s,
            work_s=work_s,
            tokens=0 if assignment is None else assignment.uncached_tokens,
            has_objective=request.slo.ttft_s is not None,
        )
        self._lines.add(waiting, request.model, None if assignment is None else assignment.worker.replica_id)
        return work_s

    def go(self, tracked: Tracked, now_s: float) -> None:
        """The request leaves its line for the worker, whose backlog is still without it: shows how fast the line moves."""
        assignment = tracked.assignment
        assert assignment is not None
        worker = assignment.worker
        line, left_s = self._lines[worker.replica_id], self._backlog.ahead_s(worker.replica_id, now_s)
        if line.taken is not None:
            then_s, had_s = line.taken
            self._predictor.line_moved(pool_of(worker), work_s=had_s - left_s, waited_s=now_s - then_s, now_s=now_s)
        line.taken = None if assignment.is_guess else (now_s, left_s + assignment.work_s)
        self.leave(tracked)

    def leave(self, tracked: Tracked) -> None:
        """The request waits no more; nothing where it did not."""
        self._lines.discard(tracked.request.request_id)
        self._give_back(tracked)
        tracked.assignment, tracked.roomless_s = None, None

    def scatter(self, replica_id: ReplicaId, now_s: float) -> None:
        """The worker takes nothing more: those in its line wait for others."""
        for request_id in [waiting.request_id for waiting in self._lines.get(replica_id, ())]:
            self._move(self._requests[request_id], now_s)

    def house(self, model: ModelId, now_s: float) -> list[ReplicaId]:
        """Finds workers for those who have none, and answers which: the requests of a model that no replica was ready for."""
        if not self._fleet.is_ready(model):
            return []
        found = []
        for request_id in self._lines.homeless(model):
            tracked = self._requests[request_id]
            self._move(tracked, now_s)
            if tracked.assignment is not None:
                found.append(tracked.assignment.worker.replica_id)
        return found

    def rethink(self, now_s: float) -> None:
        """Looks for better workers for those next in their lines that should have gone by now: others are idle, perhaps, or have room."""
        firsts = []
        for replica_id, line in self._lines.items():
            lease = self._fleet.get(replica_id)
            first = None if lease is None else line.first(self._planner.starts_s(lease, now_s), self._shares)
            if first is not None and self._requests[first.request_id].rethink_s <= now_s:
                firsts.append((first.priority, first.latest_start_s, first.request_id))
        for _, _, request_id in sorted(firsts)[:_RETHOUGHT_AT_ONCE]:
            self._move(self._requests[request_id], now_s)

    def lines_due(self, touched: Iterable[ReplicaId], now_s: float) -> list[ReplicaId]:
        """Lines to look at: of workers whose work has changed, and those that are stuck; by class and latest start of their first."""
        firsts = []
        for replica_id in {**self._stuck, **dict.fromkeys(touched)}:
            line, lease = self._lines.get(replica_id), self._fleet.get(replica_id)
            first = None if line is None or lease is None else line.first(self._planner.starts_s(lease, now_s), self._shares)
            if first is None:
                self._stuck.pop(replica_id, None)
            else:
                firsts.append((first.priority, first.latest_start_s, replica_id))
        return [replica_id for _, _, replica_id in sorted(firsts)]

    def try_next(self, replica_id: ReplicaId, now_s: float, *, has_slot: bool) -> Turn | None:
        """Who goes from this line now; None where nobody may."""
        line, lease = self._lines.get(replica_id), self._fleet.get(replica_id)
        self._stuck.pop(replica_id, None)
        if line is None or lease is None:
            return None
        if not has_slot:
            self._stuck[replica_id] = None
            return None
        starts_s = self._planner.starts_s(lease, now_s)
        first = line.first(starts_s, self._shares)
        assert first is not None
        reserved = self._reserved.get(lease.model)
        holder = None if reserved is None else line.get(reserved[0])
        if holder is not None and holder is not first:
            turn = self._try(holder, lease, now_s, starts_s, is_holder=True)
            if turn is not None:
                return turn
        return self._try(first, lease, now_s, starts_s)

    def _try(self, waiting: Waiting, lease: Lease, now_s: float, starts_s: float, *, is_holder: bool = False) -> Turn | None:
        """Its turn, if it may go. `is_holder`: a decode worker is kept for it, which would stand idle while others go first."""
        tracked = self._requests[waiting.request_id]
        assert tracked.assignment is not None
        if not tracked.has_output:
            if not self._planner.is_open(lease, now_s):
                return None  # its own news, or the tick, bring it back
            if not is_holder and self._shares.must_wait(waiting.tenant) and self._planner.ahead_s(lease, now_s) > 0.0:
                return None  # another router's tenant has had less: it fills this worker, which is not to stand idle
            is_late = waiting.latest_start_s < starts_s and tracked.arrived_s < now_s
            if is_late and tracked.request.sheddable and self._planner.is_trusted(lease.model):
                return Turn(tracked, None)
        placement = self._planner.try_place(tracked, tracked.assignment, now_s, closed=self._closed_to(tracked))
        if placement is None:
            self._stuck[lease.replica_id] = None
            self._reserve(tracked, now_s)
            return None
        return Turn(tracked, placement)

    def _reserve(self, tracked: Tracked, now_s: float) -> None:
        """It found no room: after a while no other may join the decode worker that has most, so that none starves."""
        model = tracked.request.model
        if tracked.roomless_s is None:
            tracked.roomless_s = now_s
        elif now_s - tracked.roomless_s >= _RESERVE_AFTER_S and model not in self._reserved:
            worker = self._planner.roomiest(tracked, now_s)
            if worker is not None:
                self._reserved[model] = tracked.request.request_id, worker.replica_id

    def _closed_to(self, tracked: Tracked) -> ReplicaId | None:
        """The decode worker that is kept for another."""
        request_id, replica_id = self._reserved.get(tracked.request.model, (None, None))
        return None if request_id == tracked.request.request_id else replica_id

    def _give_back(self, tracked: Tracked) -> None:
        model, request_id = tracked.request.model, tracked.request.request_id
        if self._reserved.get(model, (None, None))[0] == request_id:
            del self._reserved[model]

    def _move(self, tracked: Tracked, now_s: float) -> None:
        self._lines.discard(tracked.request.request_id)
        self._give_back(tracked)  # a worker that is gone, perhaps
        self.line_up(tracked, self._planner.try_assign(tracked, now_s), now_s)
