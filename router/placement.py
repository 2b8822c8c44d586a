"""Where one request runs: prefill and decode worker picked together, by predicted seconds. Ties go to the lower id.

Must not book, queue or forget anything: candidates in, a placement out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.ledger import ReplicaLoad
from router.predict import Predictor
from tandem.domain import Lease, ModelId

SHORT_PROMPT = "short_prompt"
CONTINUATION = "continuation"  # its blocks are in the store: what is left to compute is a tail
NO_PREFILL_WORKER = "no_prefill_worker"
NO_DECODE_WORKER = "no_decode_worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A ready replica, its work, and how much of the prompt it is believed to have cached."""

    lease: Lease
    load: ReplicaLoad
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be placed. `total_tokens` is prompt plus resumed output."""

    model: ModelId
    total_tokens: int
    expected_output_tokens: int
    one_worker_reason: str | None
    handoff_min_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The choice, and the features its predictions were made from."""

    prefill: tuple[Lease, ...]  # best first; empty: the decode worker does both
    decode: Lease
    one_worker_reason: str
    cached_tokens: int  # of the prompt, on the worker that prefills
    uncached_tokens: int  # what it must compute
    ahead_tokens: int  # pending prefill in front of it there
    batch_requests: int  # of the decode worker, this one included
    kv_tokens: int
    backlog_s: float
    prefill_s: float  # backlog included, as the worker's receipt has it
    tpot_s: float


@dataclass(frozen=True, slots=True)
class _Prefill:
    uncached_tokens: int
    ahead_tokens: int
    backlog_s: float
    prefill_s: float


def place(
    job: Job, prefill: Sequence[Candidate], decode: Sequence[Candidate], predictor: Predictor, max_prefill_candidates: int
) -> Placement | None:
    """The least predicted seconds among ready workers; None where there are none. O(n log n)."""
    if not decode:
        return _on_one_worker(job, prefill, predictor, NO_DECODE_WORKER) if prefill else None
    reason = _one_worker_reason(job, has_prefill=bool(prefill))
    if reason is not None:
        return _on_one_worker(job, decode, predictor, reason)
    ranked = sorted(prefill, key=lambda candidate: (_prefill_seconds(job, candidate, predictor).prefill_s, candidate.lease.replica_id))
    chosen = min(decode, key=lambda candidate: (*_decode_cost(job, candidate, predictor), candidate.lease.replica_id))
    return _placement(job, ranked[0], chosen, predictor, tuple(candidate.lease for candidate in ranked[:max_prefill_candidates]), "")


def _one_worker_reason(job: Job, *, has_prefill: bool) -> str | None:
    if job.total_tokens < job.handoff_min_tokens:
        return SHORT_PROMPT
    if job.one_worker_reason is not None:
        return job.one_worker_reason
    return None if has_prefill else NO_PREFILL_WORKER


def _on_one_worker(job: Job, candidates: Sequence[Candidate], predictor: Predictor, reason: str) -> Placement:
    """One worker does both: least seconds to the last expected token."""

    def cost(candidate: Candidate) -> tuple[bool, float, int, str]:
        is_short, tpot_s, running = _decode_cost(job, candidate, predictor)
        seconds = _prefill_seconds(job, candidate, predictor).prefill_s + tpot_s * job.expected_output_tokens
        return is_short, seconds, running, candidate.lease.replica_id

    chosen = min(candidates, key=cost)
    return _placement(job, chosen, chosen, predictor, (), reason)


def _placement(job: Job, first: Candidate, decode: Candidate, predictor: Predictor, prefill: tuple[Lease, ...], reason: str) -> Placement:
    seconds = _prefill_seconds(job, first, predictor)
    return Placement(
        prefill=prefill,
        decode=decode.lease,
        one_worker_reason=reason,
        cached_tokens=first.cached_tokens,
        uncached_tokens=seconds.uncached_tokens,
        ahead_tokens=seconds.ahead_tokens,
        batch_requests=decode.load.running_requests + 1,
        kv_tokens=decode.load.kv_tokens + job.total_tokens,
        backlog_s=seconds.backlog_s,
        prefill_s=seconds.prefill_s,
        tpot_s=_decode_cost(job, decode, predictor)[1],
    )


def _prefill_seconds(job: Job, candidate: Candidate, predictor: Predictor) -> _Prefill:
    uncached_tokens = max(1, job.total_tokens - candidate.cached_tokens)  # the last token is always computed
    ahead_tokens = candidate.load.pending_prefill_tokens
    backlog_s = predictor.backlog_s(job.model, ahead_tokens)
    own_s = predictor.prefill_s(job.model, uncached_tokens=uncached_tokens, context_tokens=job.total_tokens)
    return _Prefill(uncached_tokens, ahead_tokens, backlog_s, backlog_s + own_s)


def _decode_cost(job: Job, candidate: Candidate, predictor: Predictor) -> tuple[bool, float, int]:
    """Short of KV room (it would preempt), seconds per token, running requests: compared in this order."""
    engine, load = candidate.lease.engine, candidate.load
    kv_tokens = load.kv_tokens + job.total_tokens
    room_tokens = engine.kv_blocks * engine.block_size_tokens
    tpot_s = predictor.tpot_s(job.model, batch_requests=load.running_requests + 1, kv_tokens=kv_tokens)
    return kv_tokens + job.expected_output_tokens > room_tokens, tpot_s, load.running_requests
