"""What a choice is made from and what it comes to: where a prompt waits to be computed, and where its request then runs.

Must not choose, book or queue: values only. `planner.py` makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from router.interval import Interval
from router.output_length import OutputEstimate
from router.prefix_index import StoreHolder
from tandem.domain import Lease, PredictedTerm, ReplicaId

SHORT_PROMPT = "short_prompt"
CONTINUATION = "continuation"  # its blocks are in the store: what is left to compute is a tail
QUICKER = "one_worker_quicker"  # than two and a hand-off, what it costs others on the decode worker included
NO_PREFILL_WORKER = "no_prefill_worker"
NO_DECODE_WORKER = "no_decode_worker"


def named_terms(values: Mapping[str, float]) -> tuple[PredictedTerm, ...]:
    """For the wire, in their order."""
    return tuple(PredictedTerm(name=name, predicted=float(value)) for name, value in values.items())


class Considered(NamedTuple):
    """One candidate for the prompt, in predicted seconds; for `tandem explain`. A decision makes some twenty."""

    lease: Lease
    cached_tokens: int
    ahead_s: float
    own_s: float
    others_s: float  # what the prompt delays there
    is_one_worker: bool
    fetched_tokens: int = 0  # of the cached ones: from another node's store, which is quicker than to compute them
    wait_s: float = 0.0  # for those, beyond the work ahead

    @property
    def total_s(self) -> float:
        """What candidates are compared by, where a time model decides."""
        return self.ahead_s + self.wait_s + self.own_s + self.others_s

    def terms(self) -> tuple[PredictedTerm, ...]:
        """By name, for the wire."""
        named = {
            "ahead_s": self.ahead_s,
            "wait_s": self.wait_s,
            "own_s": self.own_s,
            "others_s": self.others_s,
            "total_s": self.total_s,
            "cached_tokens": self.cached_tokens,
            "fetched_tokens": self.fetched_tokens,
        }
        return named_terms(named)


class DecodeConsidered(NamedTuple):
    """One candidate with room for the tokens after the first, which another worker computes; for `tandem explain`."""

    lease: Lease
    tpot_s: float
    handoff_gap_s: float
    rest_s: float  # from the first token to the last, as predicted
    is_too_slow: bool  # for an objective of the request, or of one that decodes there
    running_requests: int
    kv_tokens: int

    @property
    def rank(self) -> tuple[bool, float, int, ReplicaId]:
        """What candidates are compared by, the least first."""
        return self.is_too_slow, self.rest_s, self.running_requests, self.lease.replica_id

    def terms(self) -> tuple[PredictedTerm, ...]:
        """By name, for the wire."""
        named = {
            "tpot_s": self.tpot_s,
            "handoff_gap_s": self.handoff_gap_s,
            "rest_s": self.rest_s,
            "is_too_slow": self.is_too_slow,
            "running_requests": self.running_requests,
            "kv_tokens": self.kv_tokens,
        }
        return named_terms(named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The worker in whose line a request waits. `prefill` is ranked, that worker first; empty: it does both parts."""

    worker: Lease
    prefill: tuple[Lease, ...]
    one_worker_reason: str
    policy: str
    cached_tokens: int  # of the prompt, on that worker or in a store
    uncached_tokens: int  # what it must compute
    own_s: float  # seconds of that, a worker's fixed cost included
    work_s: float  # of the engine alone: what it delays those behind it
    ahead_s: float  # of what goes before it, there and in the line
    is_guess: bool  # made before the worker's pool had shown what its steps take
    queue: Interval  # in the router's line
    ttft: Interval
    considered: tuple[Considered, ...]
    wait_s: float = 0.0  # for blocks of another node's store, beyond the work ahead
    stored: Mapping[StoreHolder, int] = field(default_factory=dict)  # the prompt's leading blocks in each node's store


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an attempt runs, and what was predicted of it when it was dispatched."""

    assignment: Assignment
    prefill: tuple[Lease, ...]  # best first; empty: the decode worker does both
    decode: Lease
    is_same_node: bool
    batch_requests: int  # of the decode worker, this one included
    kv_tokens: int
    backlog_s: float  # the part of prefill that is spent behind others
    prefill_s: Interval  # backlog included, as the worker's receipt has it
    tpot: Interval
    handoff_gap: Interval | None
    e2e: Interval
    output: OutputEstimate
    considered: tuple[DecodeConsidered, ...] = ()  # for decode alone

    @property
    def worker_ids(self) -> tuple[ReplicaId, ReplicaId]:
        """Who computes the prompt, who the rest; often the same."""
        return self.worker.replica_id, self.decode.replica_id

    @property
    def worker(self) -> Lease:
        """Who computes the prompt."""
        return self.prefill[0] if self.prefill else self.decode
