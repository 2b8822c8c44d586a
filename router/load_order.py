"""Replicas of each pool by one number, the least first. Must not know what the number means."""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator

from tandem.domain import ReplicaId

_Key = tuple[float, ReplicaId]


class LoadOrder:
    """O(log replicas) a change, list moves aside."""

    def __init__(self) -> None:
        self._keys: dict[ReplicaId, tuple[Hashable, _Key]] = {}
        self._orders: dict[Hashable, list[_Key]] = {}

    def put(self, replica_id: ReplicaId, pool: Hashable, load: float) -> None:
        """The replica belongs to the pool and has this load now."""
        known = self._keys.get(replica_id)
        key = (load, replica_id)
        if known == (pool, key):
            return
        self.drop(replica_id)
        self._keys[replica_id] = (pool, key)
        insort(self._orders.setdefault(pool, []), key)

    def drop(self, replica_id: ReplicaId) -> None:
        """The replica is gone; nothing where it is not known."""
        known = self._keys.pop(replica_id, None)
        if known is None:
            return
        pool, key = known
        order = self._orders[pool]
        del order[bisect_left(order, key)]
        if not order:
            del self._orders[pool]

    def least(self, pool: Hashable) -> Iterator[ReplicaId]:
        """The pool's replicas, least load first; change nothing while it is read."""
        for _, replica_id in self._orders.get(pool, ()):
            yield replica_id
