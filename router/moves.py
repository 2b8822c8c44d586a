"""Which running requests go on elsewhere on purpose: all of a draining replica's, and one at a time from a crowded one to an idle one.

Must not end attempts or place requests: the core does.
"""

from collections.abc import Collection, Iterable, Sequence

from router.config import RouterConfig
from router.fleet import Fleet
from router.ledger import Ledger
from router.tracked import Tracked
from tandem.domain import Lease, ModelId, ReplicaState, Role

_AT_ONCE = 8  # off one replica in a tick: each costs its next worker a step over the tail of its tokens
_MIN_REQUESTS_APART = 4  # fewer is chance, and a move costs more than it brings


class Moves:
    """Chooses. A crowded replica must have been so for a while, gives one request at a time, and no request goes twice for that."""

    def __init__(self, config: RouterConfig, fleet: Fleet, ledger: Ledger) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._apart_since_s: dict[ModelId, float] = {}

    def due(self, tracked: Collection[Tracked], now_s: float) -> list[Tracked]:
        """Requests whose attempt is to end now; each goes on from its tokens. O(requests + replicas)."""
        draining = [lease for lease in self._fleet.leases if lease.state is ReplicaState.DRAINING]
        due = [one for lease in draining for one in self._off(lease, tracked)]
        return due or self._rebalanced(tracked, now_s)

    def _off(self, lease: Lease, tracked: Iterable[Tracked]) -> list[Tracked]:
        movable = [one for one in tracked if _is_movable_from(one, lease) and self._has_other(one)]
        return movable[:_AT_ONCE]

    def _has_other(self, tracked: Tracked) -> bool:
        """Whether another replica would take it."""
        model = tracked.request.model
        return any((lease.replica_id, lease.incarnation) not in tracked.avoid for role in Role for lease in self._fleet.ready(model, role))

    def _rebalanced(self, tracked: Collection[Tracked], now_s: float) -> list[Tracked]:
        due = []
        for model in self._fleet.models:
            leases = self._fleet.ready(model, Role.DECODE)
            pair = self._apart(leases) if len(leases) > 1 else None
            if pair is None:
                self._apart_since_s.pop(model, None)
                continue
            if now_s - self._apart_since_s.setdefault(model, now_s) < self._config.rebalance_after_s:
                continue
            crowded, gap_tokens = pair
            one = _best(tracked, crowded, gap_tokens)
            if one is not None:
                self._apart_since_s[model] = now_s
                due.append(one)
        return due

    def _apart(self, leases: Sequence[Lease]) -> tuple[Lease, int] | None:
        """The most crowded replica and how many KV tokens more it holds than the least, where that is too many."""
        loads = [self._ledger.view(lease.replica_id) for lease in leases]
        uses = [(load.kv_tokens / _room_tokens(lease), lease.replica_id) for lease, load in zip(leases, loads, strict=True)]
        most, least = max(uses), min(uses)
        if most[0] - least[0] < self._config.rebalance_gap_fraction:
            return None
        crowded, idle = uses.index(most), uses.index(least)
        if loads[crowded].running_requests - loads[idle].running_requests < _MIN_REQUESTS_APART:
            return None
        return leases[crowded], loads[crowded].kv_tokens - loads[idle].kv_tokens


def _best(tracked: Iterable[Tracked], crowded: Lease, gap_tokens: int) -> Tracked | None:
    """The largest request that does not turn the gap round."""
    movable = [one for one in tracked if not one.moves and 2 * one.total_tokens <= gap_tokens and _is_movable_from(one, crowded)]
    return max(movable, key=lambda one: (one.total_tokens, one.request.request_id), default=None)


def _is_movable_from(tracked: Tracked, lease: Lease) -> bool:
    """Whether it decodes there, and what it has so far goes on elsewhere as if nothing had been."""
    placement = tracked.placement
    if placement is None or tracked.is_moving or not tracked.has_first_token or tracked.request.sampling.one_worker_reason() is not None:
        return False
    return (placement.decode.replica_id, placement.decode.incarnation) == (lease.replica_id, lease.incarnation)


def _room_tokens(lease: Lease) -> int:
    return max(1, lease.engine.kv_blocks * lease.engine.block_size_tokens)
