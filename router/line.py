"""Who waits for one worker, and who is next: priority class, feasible before late, tenants by their shares, then the latest start.

Must not choose workers or know why somebody waits.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.domain import RequestId

_MANY_TENANTS = 16  # a decision looks at some fifty lines

_Place = tuple[float, int, RequestId]  # rank, arrival number, id


class Shares(Protocol):
    """Whose turn it is among tenants that wait."""

    def order(self, tenants: Iterable[str]) -> Sequence[str]:
        """The tenants, the one that has had least of its share first."""

    def must_wait(self, tenant: str) -> bool:
        """Whether another router's tenant is to go first."""

    def weight(self, tenant: str) -> float:
        """Its share beside those of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One that waits. `rank_s` orders it among its tenant's, lower first.

    With an objective of its own it is late after `latest_start_s`; without one that only orders it: else a long backlog would be late, and
    tenants' shares count for nothing.
    """

    request_id: RequestId
    tenant: str
    priority: int  # lower first
    arrival: int
    latest_start_s: float
    rank_s: float
    work_s: float
    tokens: int = 0  # to be computed
    has_objective: bool = True

    @property
    def place(self) -> _Place:
        """Where it stands among its tenant's."""
        return self.rank_s, self.arrival, self.request_id

    @property
    def may_be_late(self) -> bool:
        """Ranked by anything but the latest start none counts as late."""
        return self.has_objective and self.rank_s == self.latest_start_s


class _Own:
    """What one tenant has waiting in one class, in order: those that may be late, and the others."""

    __slots__ = ("free", "timed")

    def __init__(self) -> None:
        self.timed: list[_Place] = []
        self.free: list[_Place] = []

    def __bool__(self) -> bool:
        return bool(self.timed or self.free)

    def places(self, waiting: Waiting) -> list[_Place]:
        return self.timed if waiting.may_be_late else self.free

    def first(self) -> _Place:
        """The first of all, late or not."""
        return min([*self.timed[:1], *self.free[:1]])

    def first_in_time(self, now_s: float) -> _Place | None:
        """The first that can still start in time."""
        index = bisect_left(self.timed, (now_s, -1, RequestId("")))
        return min([*self.timed[index : index + 1], *self.free[:1]], default=None)


class Line:
    """One worker's. O(log waiting) an event, list moves aside."""

    def __init__(self) -> None:
        self._entries: dict[RequestId, Waiting] = {}
        self._classes: dict[int, dict[str, _Own]] = {}
        self._work_s: dict[int, dict[str, float]] = {}  # by class and tenant
        self._class_s: dict[int, float] = {}  # by class
        self.tokens = 0  # of all that wait
        self.taken: tuple[float, float] | None = None  # when one was last taken, and the seconds of work that the worker had then

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries.values())

    def get(self, request_id: RequestId) -> Waiting | None:
        """The one of this id; None where it is not here."""
        return self._entries.get(request_id)

    @property
    def work_s(self) -> float:
        """Predicted seconds of all that wait."""
        return sum(self._class_s.values())

    def work_before_s(self, priority: int, tenant: str, own_s: float, shares: Shares) -> float:
        """Predicted seconds of those before a newcomer that takes `own_s`: of classes above, of its tenant, and the share of others.

        While its tenant is served what it has here and the newcomer, every other is served as much by weight, as far as it has so much.
        Of many tenants all of it is counted.
        """
        work_s = sum(class_s for level, class_s in self._class_s.items() if level < priority)
        tenants = self._work_s.get(priority)
        if tenants is None:
            return work_s
        before_s = tenants.get(tenant, 0.0)
        if len(tenants) == (tenant in tenants) or len(tenants) > _MANY_TENANTS:
            return work_s + self._class_s[priority]
        share_s = (before_s + own_s) / shares.weight(tenant)
        return (
            work_s + before_s + sum(min(theirs_s, share_s * shares.weight(other)) for other, theirs_s in tenants.items() if other != tenant)
        )

    def add(self, waiting: Waiting) -> None:
        """Takes one that is not here yet."""
        assert waiting.request_id not in self._entries, f"{waiting.request_id} waits twice"
        self._entries[waiting.request_id] = waiting
        own = self._classes.setdefault(waiting.priority, {}).setdefault(waiting.tenant, _Own())
        insort(own.places(waiting), waiting.place)
        tenants = self._work_s.setdefault(waiting.priority, {})
        tenants[waiting.tenant] = tenants.get(waiting.tenant, 0.0) + waiting.work_s
        self._class_s[waiting.priority] = self._class_s.get(waiting.priority, 0.0) + waiting.work_s
        self.tokens += waiting.tokens

    def remove(self, request_id: RequestId) -> Waiting:
        """Gives one up. Raises KeyError where it is not here."""
        waiting = self._entries.pop(request_id)
        tenants = self._classes[waiting.priority]
        own = tenants[waiting.tenant]
        places = own.places(waiting)
        del places[bisect_left(places, waiting.place)]
        self._work_s[waiting.priority][waiting.tenant] -= waiting.work_s
        self._class_s[waiting.priority] -= waiting.work_s
        self.tokens -= waiting.tokens
        if not own:  # and no rest of rounding is left behind
            del tenants[waiting.tenant], self._work_s[waiting.priority][waiting.tenant]
        if not tenants:
            del self._classes[waiting.priority], self._work_s[waiting.priority], self._class_s[waiting.priority]
        return waiting

    def first(self, now_s: float, shares: Shares) -> Waiting | None:
        """Who is next; None where nobody waits. Late ones only where nobody of their class is in time, each tenant's earliest first."""
        if not self._entries:
            return None
        tenants = self._classes[min(self._classes)]
        order = list(tenants) if len(tenants) == 1 else shares.order(tenants)
        for tenant in order:
            place = tenants[tenant].first_in_time(now_s)
            if place is not None:
                return self._entries[place[2]]
        return self._entries[tenants[order[0]].first()[2]]

    def check_invariants(self) -> None:
        """Raises AssertionError where a count, an order or a sum is broken; O(waiting log waiting)."""
        placed: list[RequestId] = []
        for priority, tenants in self._classes.items():
            own = [entry for entry in self._entries.values() if entry.priority == priority]
            work_s = sum(entry.work_s for entry in own)
            assert abs(self._class_s[priority] - work_s) < 1e-6, "the work is not the sum"
            assert abs(sum(self._work_s[priority].values()) - work_s) < 1e-6, "the work is not the sum of the tenants'"
            assert set(self._work_s[priority]) == set(tenants), "work of a tenant that does not wait"
            for tenant, theirs in tenants.items():
                for may_be_late, places in ((True, theirs.timed), (False, theirs.free)):
                    all_places = sorted(entry.place for entry in own if entry.tenant == tenant and entry.may_be_late == may_be_late)
                    assert places == all_places, "a line is out of order"
                    placed += [request_id for _, _, request_id in places]
        assert self.tokens == sum(entry.tokens for entry in self), "the tokens are not the sum"
        assert sorted(placed) == sorted(self._entries), "some wait nowhere"
        assert set(self._work_s) == set(self._class_s) == set(self._classes), "work of nobody"
