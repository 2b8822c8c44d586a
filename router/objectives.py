"""The strictest TPOT objective among the requests that decode on each replica. Must not judge or choose."""

from collections import Counter
from math import inf

from tandem.domain import ReplicaId


class Objectives:
    """Of this router's requests; those that state none count for nothing. O(different objectives) to read, and there are few."""

    def __init__(self) -> None:
        self._tpot_s: dict[ReplicaId, Counter[float]] = {}

    def add(self, replica_id: ReplicaId, tpot_s: float | None) -> None:
        """A request with this objective runs there."""
        if tpot_s is not None:
            self._tpot_s.setdefault(replica_id, Counter())[tpot_s] += 1

    def remove(self, replica_id: ReplicaId, tpot_s: float | None) -> None:
        """One that was added is over."""
        if tpot_s is None:
            return
        counts = self._tpot_s[replica_id]
        counts[tpot_s] -= 1
        if not counts[tpot_s]:
            del counts[tpot_s]
        if not counts:
            del self._tpot_s[replica_id]

    def tpot_s(self, replica_id: ReplicaId) -> float:
        """Seconds per token that no request there is to exceed; inf where none says."""
        counts = self._tpot_s.get(replica_id)
        return inf if counts is None else min(counts)

    def __len__(self) -> int:
        """Replicas with a request that states one."""
        return len(self._tpot_s)
