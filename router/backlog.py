"""Seconds of prefill in front of a new prompt on each worker: this router's dispatches in order, the oldest of them partly done.

A worker computes its prompts one after the other; what it has done of the first is taken from the time since it began.
Must not predict: seconds come in.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from router.ledger import BookingKey
from tandem.domain import ReplicaId

# Of a prompt that takes longer than predicted: so much of it is always thought to be left.
_LEAST_LEFT_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class _Prompt:
    work_s: float
    tokens: int


@dataclass(slots=True)
class _Worker:
    prompts: OrderedDict[BookingKey, _Prompt] = field(default_factory=OrderedDict)
    work_s: float = 0.0
    tokens: int = 0
    head_since_s: float = 0.0  # when its first prompt is thought to have begun


class Backlog:
    """By worker. Workers it does not know are ignored: their loss comes before late news of them. O(1) an event."""

    def __init__(self) -> None:
        self._workers: dict[ReplicaId, _Worker] = {}

    def add_replica(self, replica_id: ReplicaId) -> None:
        """Starts with nothing."""
        self._workers[replica_id] = _Worker()

    def remove_replica(self, replica_id: ReplicaId) -> None:
        """Forgets it."""
        self._workers.pop(replica_id, None)

    def start(self, replica_id: ReplicaId, key: BookingKey, *, work_s: float, tokens: int, now_s: float) -> None:
        """A prompt was sent that takes `work_s` by itself."""
        worker = self._workers.get(replica_id)
        if worker is None or tokens <= 0:
            return
        assert key not in worker.prompts, f"{key} is sent twice to {replica_id}"
        if not worker.prompts:
            worker.head_since_s = now_s
        worker.prompts[key] = _Prompt(work_s, tokens)
        worker.work_s += work_s
        worker.tokens += tokens

    def end(self, replica_id: ReplicaId, key: BookingKey, now_s: float) -> None:
        """The prompt is computed, or given up; again is no harm."""
        worker = self._workers.get(replica_id)
        if worker is None or key not in worker.prompts:
            return
        is_head = next(iter(worker.prompts)) == key
        prompt = worker.prompts.pop(key)
        worker.work_s -= prompt.work_s
        worker.tokens -= prompt.tokens
        if is_head:
            worker.head_since_s = now_s
        if not worker.prompts:
            worker.work_s = 0.0  # and no rest of rounding

    def ahead(self, replica_id: ReplicaId, now_s: float) -> tuple[float, int]:
        """Seconds until the worker has computed what was sent to it, and the tokens of that; 0 for one that is not known."""
        worker = self._workers.get(replica_id)
        if worker is None or not worker.prompts:
            return 0.0, 0
        head = next(iter(worker.prompts.values()))
        done_s = min(now_s - worker.head_since_s, head.work_s * (1.0 - _LEAST_LEFT_FRACTION))
        return max(0.0, worker.work_s - max(0.0, done_s)), worker.tokens

    def ahead_s(self, replica_id: ReplicaId, now_s: float) -> float:
        """The seconds alone."""
        return self.ahead(replica_id, now_s)[0]

    def free_at_s(self, replica_id: ReplicaId) -> float:
        """When it will have computed them, as predicted; the past where it has nothing. For comparing workers without a clock."""
        worker = self._workers.get(replica_id)
        return 0.0 if worker is None or not worker.prompts else worker.head_since_s + worker.work_s

    def tokens(self, replica_id: ReplicaId) -> int:
        """Tokens of those prompts."""
        worker = self._workers.get(replica_id)
        return 0 if worker is None else worker.tokens

    def check_invariants(self) -> None:
        """The running sums are the sums. Raises AssertionError."""
        for replica_id, worker in self._workers.items():
            assert worker.tokens == sum(prompt.tokens for prompt in worker.prompts.values()), f"{replica_id}: tokens are not the sum"
            assert abs(worker.work_s - sum(prompt.work_s for prompt in worker.prompts.values())) < 1e-6, (
                f"{replica_id}: work is not the sum"
            )
