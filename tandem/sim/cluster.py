"""The router's core with simulated replicas round it: carries out what it answers, tells it what happens, writes down every request.

Must not decide where anything runs: every choice is the core's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from struct import Struct
from typing import cast

from router.core import RouterCore
from router.instructions import Abandon, CopyPrefix, Dispatch, Instruction, Reject
from tandem.domain import Lease, Receipt, ReplicaId, Request, RequestId, Role, Sampling, Slo
from tandem.held_blocks import BlockChange
from tandem.sim.arrivals import Arrival
from tandem.sim.engine_profile import EngineProfile
from tandem.sim.objective import Objective
from tandem.sim.physics import Job
from tandem.sim.replicas import MODEL, NAMESPACE, simulated_lease
from tandem.sim.store import STORE_NODE, Store
from tandem.sim.timeline import Timeline
from tandem.sim.watch import Watch
from tandem.sim.worker import Network, Report, Worker
from tandem.workload import TRACE_BLOCK_TOKENS

_TICK_S = 0.05  # as the live router
_EVENT = Struct("<cIdI")
_SAMPLING = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What is simulated, but for the requests and the seed. Caches in tokens; no store where it is None."""

    profile: EngineProfile
    prefill_replicas: int
    decode_replicas: int
    local_tokens: int
    store_tokens: int | None
    is_store_known: bool = True  # to the router; the workers use it all the same
    network: Network = field(default_factory=Network)
    objective: Objective | None = None  # that requests state
    step_noise_sigma: float = 0.05
    slow_replica: float = 1.0  # how many times slower the first prefill replica is from half time on
    slow_fleet: float = 1.0  # the same for all


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one request; None: it did not happen."""

    arrival: Arrival
    first_token_s: float | None = None
    end_s: float | None = None
    cached_tokens: int = 0
    is_rejected: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of a token after the first; None for one token."""
        if self.first_token_s is None or self.end_s is None or self.arrival.output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.arrival.output_tokens - 1)


@dataclass(slots=True, eq=False)
class _Attempt:
    outcome: Outcome
    request_id: RequestId
    number: int
    begun_s: float
    prefiller: Worker
    decoder: Worker
    total_tokens: int
    output_tokens: int
    prefill_job: Job | None = None
    decode_job: Job | None = None
    first_token_s: float | None = None
    sent_tokens: int = 0
    handoff_s: float = 0.0


class Cluster:
    """One run. `run` once."""

    def __init__(self, plan: ClusterPlan, core: RouterCore, arrivals: Sequence[Arrival], seed: int) -> None:
        self.timeline = Timeline()
        self.outcomes = {RequestId(str(arrival.number)): Outcome(arrival=arrival) for arrival in arrivals}
        self._plan = plan
        self._core = core
        self.watch = Watch(core.predictor, MODEL)
        self._digest = blake2b(digest_size=16)
        self._attempts: dict[RequestId, _Attempt] = {}
        self._sent: dict[RequestId, int] = {}  # tokens of ended attempts
        self._open = len(arrivals)
        self._jobs = 0
        self._store: Store | None = None
        if plan.store_tokens is not None:
            capacity_blocks = plan.store_tokens // TRACE_BLOCK_TOKENS
            self._store = Store(capacity_blocks, self.timeline, delay_s=plan.network.report_delay_s, tell=self._stored)
        self._workers: dict[ReplicaId, Worker] = {}
        for role, count in ((Role.PREFILL, plan.prefill_replicas), (Role.DECODE, plan.decode_replicas)):
            for index in range(count):
                self._add_worker(simulated_lease(role, index, plan.profile), seed)
        for arrival in arrivals:
            self.timeline.at(arrival.time_s, self._arrive, arrival)
        self.timeline.at(0.0, self._tick)
        if arrivals and (plan.slow_replica != 1.0 or plan.slow_fleet != 1.0):
            self.timeline.at(arrivals[-1].time_s / 2, self._slow_down)

    def run(self) -> str:
        """Until the last request has ended; the digest of the event log."""
        self.timeline.run()
        return self._digest.hexdigest()

    @property
    def workers(self) -> Sequence[Worker]:
        """All replicas, prefill first."""
        return tuple(self._workers.values())

    def _add_worker(self, lease: Lease, seed: int) -> None:
        plan = self._plan
        self._workers[lease.replica_id] = Worker(
            lease,
            plan.profile,
            plan.network,
            self.timeline,
            Random(f"{lease.replica_id} {seed}"),
            cache_blocks=plan.local_tokens // TRACE_BLOCK_TOKENS,
            store=self._store,
            noise_sigma=plan.step_noise_sigma,
            report=self._report,
        )
        self._carry_out(self._core.replica_seen(lease, 0.0))

    # What happens.

    def _arrive(self, arrival: Arrival) -> None:
        self._log(b"a", arrival.number)
        request = Request(
            request_id=RequestId(str(arrival.number)),
            model=MODEL,
            prompt_token_ids=cast("tuple[int, ...]", range(arrival.prompt_tokens)),  # the core counts them and reads none
            sampling=_SAMPLING,
            session_id=arrival.session,
            slo=self._slo(arrival),
        )
        self._carry_out(self._core.submit(request, block_hashes=arrival.block_hashes, deadline_s=None, now_s=self.timeline.now_s))

    def _slo(self, arrival: Arrival) -> Slo:
        objective = self._plan.objective
        if objective is None:
            return Slo()
        return Slo(ttft_s=objective.ttft_s(arrival.prompt_tokens, self._plan.profile), tpot_s=objective.tpot_s)

    def _tick(self) -> None:
        if self._open:
            self._carry_out(self._core.tick(self.timeline.now_s))
            self.watch.look(self.timeline.now_s)
            self.timeline.at(self.timeline.now_s + _TICK_S, self._tick)

    def _slow_down(self) -> None:
        self.watch.disturbed(self.timeline.now_s)
        for index, worker in enumerate(self._workers.values()):
            factor = self._plan.slow_fleet * (self._plan.slow_replica if index == 0 else 1.0)
            worker.engine.set_slow_factor(factor)

    def _report(self, report: Report) -> None:
        core, replica_id, incarnation = self._core, report.lease.replica_id, report.lease.incarnation
        core.report(replica_id, incarnation, report.sequence, report.load, report.stamps)
        if report.samples:
            core.steps(replica_id, incarnation, report.samples, self.timeline.now_s)
        if report.blocks:
            core.cached(replica_id, incarnation, report.blocks)

    def _stored(self, change: BlockChange) -> None:
        if self._plan.is_store_known:
            self._core.stored(STORE_NODE, NAMESPACE, change)

    # What the core wants.

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Dispatch():
                    self.timeline.at(self.timeline.now_s + self._plan.network.dispatch_s, self._begin, instruction)
                case Reject():
                    self._close(self.outcomes[instruction.request_id], instruction.request_id)
                    self.outcomes[instruction.request_id].is_rejected = True
                case Abandon():
                    self.timeline.at(self.timeline.now_s, self._abandon, instruction)
                case CopyPrefix():
                    pass  # all replicas share one store: there is no other to copy to

    def _begin(self, dispatch: Dispatch) -> None:
        request_id, plan = dispatch.request_id, dispatch.plan
        outcome = self.outcomes[request_id]
        arrival, sent = outcome.arrival, self._sent.get(request_id, 0)
        decoder = self._workers[plan.decode.replica_id]
        prefiller = self._workers[plan.prefill[0].replica_id] if plan.prefill else decoder
        self._log(b"d", arrival.number, prefiller.lease.replica_id + decoder.lease.replica_id)
        total_tokens = arrival.prompt_tokens + sent
        attempt = _Attempt(
            outcome=outcome,
            request_id=request_id,
            number=dispatch.attempt,
            begun_s=self.timeline.now_s,
            prefiller=prefiller,
            decoder=decoder,
            total_tokens=total_tokens,
            output_tokens=arrival.output_tokens - sent,
        )
        self._attempts[request_id] = attempt
        uncached = total_tokens - prefiller.cached_tokens(arrival.block_hashes, total_tokens)
        prefiller.accept(request_id, attempt.number, prefill_tokens=uncached, kv_tokens=total_tokens)
        if decoder is not prefiller:
            decoder.accept(request_id, attempt.number, prefill_tokens=0, kv_tokens=total_tokens)
        attempt.prefill_job = self._job(attempt, 1 if decoder is not prefiller else attempt.output_tokens)
        prefiller.prefill(attempt.prefill_job, arrival.block_hashes)

    def _job(self, attempt: _Attempt, output_tokens: int) -> Job:
        self._jobs += 1
        hashes, worker = attempt.outcome.arrival.block_hashes, attempt.prefiller

        def match(job: Job) -> int:
            return worker.cached_tokens(hashes, job.total_tokens)

        def first(job: Job) -> None:
            self._first_token(attempt, job)

        def end(job: Job) -> None:
            self._job_ended(attempt)

        return Job(
            number=self._jobs,
            priority=0,
            total_tokens=attempt.total_tokens,
            output_tokens=output_tokens,
            on_first_token=first,
            on_end=end,
            match_tokens=match,
        )

    def _first_token(self, attempt: _Attempt, job: Job) -> None:
        now_s, outcome = self.timeline.now_s, attempt.outcome
        attempt.first_token_s, attempt.sent_tokens = now_s, 1
        if outcome.first_token_s is None:
            outcome.first_token_s, outcome.cached_tokens = now_s, job.cached_tokens
            self._log(b"f", outcome.arrival.number)
        attempt.prefiller.computed(outcome.arrival.block_hashes)
        if attempt.decoder is attempt.prefiller:
            attempt.prefiller.prefilled(attempt.request_id, attempt.number)
        else:
            attempt.prefiller.finish(attempt.request_id, attempt.number)
        self._carry_out(self._core.tokens(attempt.request_id, attempt.number, 1, now_s))

    def _job_ended(self, attempt: _Attempt) -> None:
        """The prefill worker has done its one token, or whoever decodes its last."""
        if attempt.decoder is not attempt.prefiller and attempt.decode_job is None and attempt.output_tokens > 1:
            attempt.handoff_s = attempt.decoder.handoff_s(attempt.total_tokens)
            attempt.decode_job = self._job(attempt, attempt.output_tokens - 1)
            attempt.decode_job.total_tokens += 1
            self.timeline.at(self.timeline.now_s + attempt.handoff_s, self._hand_over, attempt)
        else:
            self._finish(attempt)

    def _hand_over(self, attempt: _Attempt) -> None:
        assert attempt.decode_job is not None
        if not attempt.decode_job.is_cancelled:
            attempt.decoder.received(attempt.outcome.arrival.block_hashes)
            attempt.decoder.engine.decode(attempt.decode_job)

    def _finish(self, attempt: _Attempt) -> None:
        now_s, request_id = self.timeline.now_s, attempt.request_id
        outcome, arrival = attempt.outcome, attempt.outcome.arrival
        attempt.decoder.finish(request_id, attempt.number)
        rest = attempt.output_tokens - attempt.sent_tokens
        if rest:
            self._carry_out(self._core.tokens(request_id, attempt.number, rest, now_s))
        outcome.end_s = now_s
        self._close(outcome, request_id)
        self._carry_out(self._core.finished(request_id, attempt.number, self._receipt(attempt, arrival), now_s))
        self.watch.ended(now_s)
        attempt.prefill_job = attempt.decode_job = None  # they know the attempt: nobody collects such cycles while a run lasts

    def _receipt(self, attempt: _Attempt, arrival: Arrival) -> Receipt:
        """As the workers and the router would write it; token 2 of a hand-off is a mean step after its KV."""
        now_s, dispatch_s = self.timeline.now_s, self._plan.network.dispatch_s
        first_s = now_s if attempt.first_token_s is None else attempt.first_token_s
        is_handed_off = attempt.decode_job is not None
        step_s = (now_s - first_s - attempt.handoff_s) / max(1, attempt.output_tokens - 1)
        return Receipt(
            request_id=attempt.request_id,
            queue_s=max(0.0, attempt.begun_s - dispatch_s - arrival.time_s),
            dispatch_s=dispatch_s,
            prefill_s=first_s - attempt.begun_s,
            ttft_s=first_s - arrival.time_s,
            handoff_gap_s=attempt.handoff_s + step_s if is_handed_off else 0.0,
            transfer_s=attempt.handoff_s,
            decode_s=now_s - first_s,
            e2e_s=now_s - arrival.time_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            cached_tokens=0 if attempt.prefill_job is None else attempt.prefill_job.cached_tokens,
            kv_bytes_shipped=attempt.decoder.handoff_bytes(attempt.total_tokens) if is_handed_off else 0,
            prefill_replica_id=attempt.prefiller.lease.replica_id,
            decode_replica_id=attempt.decoder.lease.replica_id,
            handed_off=is_handed_off,
        )

    def _abandon(self, instruction: Abandon) -> None:
        attempt = self._attempts.get(instruction.request_id)
        if attempt is None or attempt.number != instruction.attempt:
            return
        made = attempt.sent_tokens
        for job, worker in ((attempt.prefill_job, attempt.prefiller), (attempt.decode_job, attempt.decoder)):
            if job is not None:
                made += worker.engine.made_tokens(job)
                worker.engine.cancel(job)
        for worker in (attempt.prefiller, attempt.decoder):
            worker.finish(attempt.request_id, attempt.number)
        if made > attempt.sent_tokens:
            self._carry_out(self._core.tokens(attempt.request_id, attempt.number, made - attempt.sent_tokens, self.timeline.now_s))
        self._sent[attempt.request_id] = self._sent.get(attempt.request_id, 0) + made
        del self._attempts[attempt.request_id]
        self._carry_out(self._core.failed(attempt.request_id, attempt.number, instruction.error, self.timeline.now_s))

    def _close(self, outcome: Outcome, request_id: RequestId) -> None:
        self._attempts.pop(request_id, None)
        self._open -= 1
        self._log(b"e", outcome.arrival.number)

    def _log(self, kind: bytes, number: int, detail: str = "") -> None:
        self._digest.update(_EVENT.pack(kind, number, self.timeline.now_s, len(detail)))
        if detail:
            self._digest.update(detail.encode())
