"""Which of a role's workers a decision looks at: all of them, or of very many the promising ones and two at random.

Must not choose among them: the planner does.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from random import Random

from router.backlog import Backlog
from router.fleet import Fleet
from router.ledger import Ledger
from router.line import Line
from router.load_order import LoadOrder
from router.prefix_index import Match
from tandem.domain import Lease, ModelId, ReplicaId, Role

MAX_SCANNED = 64  # above it the loss against looking at all is not measurable (reference/algorithms.md, 2.12)
_MAX_UNSORTED = 4096


class Shortlist:
    """Knows the order of the replicas by load; sorts late. `on_gone` is told of those that take no more work."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        backlog: Backlog,
        lines: Mapping[ReplicaId, Line],
        rng: Random,
        *,
        on_gone: Callable[[ReplicaId], None],
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._backlog = backlog
        self._lines = lines
        self._rng = rng
        self._on_gone = on_gone
        self._by_work = LoadOrder()
        self._by_requests = LoadOrder()
        self._unsorted: set[ReplicaId] = set()  # whose places in both orders may be others now

    def note_load(self, replica_id: ReplicaId) -> None:
        """What the replica has to do has changed, or it came or went."""
        self._unsorted.add(replica_id)
        if len(self._unsorted) > _MAX_UNSORTED:
            self._sort()

    def for_prompt(self, leases: Sequence[Lease], cached: Match) -> Sequence[Lease]:
        """Of these, which are of one role and sorted by id: the best holder, the one with the least work and two at random."""
        if len(leases) <= MAX_SCANNED:
            return leases
        self._sort()
        few = {lease.replica_id: lease for lease in self._draw(leases)}
        for lease in (self._best_holder(cached, leases), self._first_of(self._by_work.least(_pool(leases)), leases)):
            if lease is not None:
                few[lease.replica_id] = lease
        return [few[replica_id] for replica_id in sorted(few)]

    def for_decode(self, leases: Sequence[Lease]) -> Sequence[Lease]:
        """Of these, which are of one role and sorted by id: the one with the fewest requests and two at random."""
        if len(leases) <= MAX_SCANNED:
            return leases
        self._sort()
        idlest = self._first_of(self._by_requests.least(_pool(leases)), leases)
        return [*self._draw(leases), *([] if idlest is None else [idlest])]

    def _draw(self, leases: Sequence[Lease]) -> tuple[Lease, Lease]:
        """Two different ones; a tenth of the time that `Random.sample` takes."""
        draw, count = self._rng.random, len(leases)
        first, second = int(draw() * count), int(draw() * (count - 1))
        return leases[first], leases[second + (second >= first)]

    def _sort(self) -> None:
        """Before an order is read: replicas change several times between two decisions, and small fleets need no order at all."""
        for replica_id in self._unsorted:
            lease = self._fleet.get(replica_id)
            if lease is None or not self._fleet.is_taking(lease):
                self._by_work.drop(replica_id)
                self._by_requests.drop(replica_id)
                self._on_gone(replica_id)
                continue
            line, pool = self._lines.get(replica_id), (lease.model, lease.role)
            self._by_work.put(replica_id, pool, self._backlog.free_at_s(replica_id) + (0.0 if line is None else line.work_s))
            self._by_requests.put(replica_id, pool, self._ledger.view(replica_id).running_requests)
        self._unsorted.clear()

    def _first_of(self, names: Iterable[ReplicaId], leases: Sequence[Lease]) -> Lease | None:
        """The first of these replicas that is among the leases; looks at a few only."""
        found = (_among(replica_id, leases) for replica_id in islice(names, MAX_SCANNED))
        return next((lease for lease in found if lease is not None), None)

    def _best_holder(self, cached: Match, leases: Sequence[Lease]) -> Lease | None:
        """Of these the one that has most leading blocks; ties go to the lower id."""
        best, best_blocks, role = None, 0, leases[0].role
        for (replica_id, _), blocks in cached.items():
            if blocks < best_blocks or (best is not None and blocks == best_blocks and replica_id > best.replica_id):
                continue
            known = self._fleet.get(replica_id)
            if known is not None and known.role is role:  # quicker than to look among the leases
                lease = _among(replica_id, leases)
                if lease is not None:
                    best, best_blocks = lease, blocks
        return best


def _pool(leases: Sequence[Lease]) -> tuple[ModelId, Role]:
    return leases[0].model, leases[0].role


def _among(replica_id: ReplicaId, leases: Sequence[Lease]) -> Lease | None:
    """Its lease where it is one of these, which are sorted by id."""
    index = bisect_left(leases, replica_id, key=_replica_id)
    return leases[index] if index < len(leases) and leases[index].replica_id == replica_id else None


def _replica_id(lease: Lease) -> ReplicaId:
    return lease.replica_id
