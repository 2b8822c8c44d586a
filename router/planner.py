"""Chooses by the state it is given: the worker in whose line a prompt waits, and the decode worker when its turn has come.

Must not change what it reads, but for what a policy remembers: fleet, ledger, lines, prefix index and predictor are the core's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from random import Random

from router.backlog import Backlog
from router.config import RouterConfig
from router.estimator import Estimator, Quote, Rates, chunk_tokens, kv_room_tokens, pool_of
from router.fleet import Fleet
from router.instructions import ReplicaStatus
from router.ledger import Ledger, ReplicaLoad
from router.line import Line, Shares
from router.objectives import Objectives
from router.output_length import OutputEstimate, OutputLengths
from router.placement import NO_DECODE_WORKER, NO_PREFILL_WORKER, QUICKER, SHORT_PROMPT, Assignment, Considered, DecodeConsidered, Placement
from router.policies import DEFAULT_POLICY, PEER_POLICIES, PolicyParameters, PolicyState, PrefillJob, PrefillView
from router.predict import EngineWork, LoadPredictor
from router.prefix_index import PrefixIndex
from router.shortlist import MAX_SCANNED, Shortlist
from router.tracked import Tracked
from tandem.domain import Lease, ModelId, ReplicaId, Role

_HANDOFF_MIN_BLOCKS = 2
_FALLBACK_POLICY = "lmetric"  # needs no time model
_AHEAD_TOKENS_CHUNKS = 2.0  # of work ahead where seconds are not trusted


class Planner:
    """Places requests. Belongs to one core."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        ledger: Ledger,
        backlog: Backlog,
        lines: Mapping[ReplicaId, Line],
        shares: Shares,
        prefixes: PrefixIndex,
        predictor: LoadPredictor,
        lengths: OutputLengths,
        rng: Random,
        parameters: PolicyParameters,
        objectives: Objectives,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._backlog = backlog
        self._lines = lines
        self._prefixes = prefixes
        self._predictor = predictor
        self._lengths = lengths
        self._objectives = objectives
        self._estimator = Estimator(config, ledger=ledger, backlog=backlog, lines=lines, shares=shares, predictor=predictor)
        self._policy_state = PolicyState(rng=rng, parameters=parameters)
        self._shortlist = Shortlist(fleet, ledger, backlog, lines, rng, on_gone=self._forget)

    def note_load(self, replica_id: ReplicaId) -> None:
        """What the replica has to do has changed, or it came or went."""
        self._shortlist.note_load(replica_id)

    def _forget(self, replica_id: ReplicaId) -> None:
        self._estimator.forget(replica_id)
        self._policy_state.forget(replica_id)

    # The prompt's worker.

    def try_assign(self, tracked: Tracked, now_s: float) -> Assignment | None:
        """The worker in whose line the prompt is to wait; None where no worker may have it now.

        Workers that failed the request are left out while there are others, and held back for a while where there are none.
        """
        prefill, decode = self._usable(tracked, now_s)
        if not prefill and not decode:
            return None
        one_worker = decode or prefill
        reason = self._one_worker_reason(tracked, one_worker[0], has_prefill=bool(prefill), has_decode=bool(decode))
        quote = Quote(self._predictor, tracked, self._prefixes.match(tracked.block_keys), now_s)
        if reason:
            considered = self._considered(quote, one_worker, is_one_worker=True)
            output = self.output(tracked)
            chosen = min(considered, key=lambda one: (self._one_worker_cost(quote, one, output), one.lease.replica_id))
            return self._assignment(quote, chosen, (), reason, DEFAULT_POLICY, considered)
        considered, policy = self._ranked(quote, prefill)
        chosen = considered[0]
        if policy == DEFAULT_POLICY:
            local = self._quicker(quote, chosen, decode)
            if local is not None:
                return self._assignment(quote, local, (), QUICKER, policy, [local, *considered])
        leases = tuple(one.lease for one in considered[: self._config.max_prefill_candidates])
        return self._assignment(quote, chosen, leases, "", policy, considered)

    def alone_s(self, tracked: Tracked) -> float:
        """Seconds of its prefill on a replica as the model's last one, nothing of it cached: for requests that no replica is there for."""
        lease = self._fleet.last_lease(tracked.request.model)
        if lease is None:
            return 0.0
        work = EngineWork(chunk_tokens=chunk_tokens(lease))
        return self._predictor.prefill_s(pool_of(lease), "", work, uncached_tokens=tracked.total_tokens, cached_tokens=0)

    def ahead_s(self, lease: Lease, now_s: float) -> float:
        """Seconds of prefill that the worker has been given and has not done: this router's, less what has passed, and others'."""
        return self._estimator.ahead_s(lease, now_s)

    def status(self, lease: Lease, now_s: float) -> ReplicaStatus:
        """The worker's last totals, and the seconds of prefill it has been given or has waiting."""
        line = self._lines.get(lease.replica_id)
        work_s = self.ahead_s(lease, now_s) + (0.0 if line is None else line.work_s)
        return ReplicaStatus(lease=lease, load=self._ledger.reported(lease.replica_id), predicted_work_s=work_s)

    def is_trusted(self, model: ModelId) -> bool:
        """Whether decisions rest on predicted seconds."""
        return self._predictor.scores.is_trusted(model)

    def starts_s(self, lease: Lease, now_s: float) -> float:
        """When the worker would begin with a prompt that it is given now, as predicted; not trusted, that only orders those that wait."""
        return now_s + self.ahead_s(lease, now_s)

    def is_open(self, lease: Lease, now_s: float) -> bool:
        """Whether the worker may be given a further prompt: at most one chunk and 50 ms of work.

        Where seconds are not trusted two chunks of tokens: one that is being computed, nobody knows how far, and the next.
        """
        if self.is_trusted(lease.model):
            return self.ahead_s(lease, now_s) <= self._config.ahead_s + self.chunk_s(lease)
        tokens = max(self._backlog.tokens(lease.replica_id), self._ledger.view(lease.replica_id).pending_prefill_tokens)  # others' too
        return tokens <= _AHEAD_TOKENS_CHUNKS * chunk_tokens(lease)

    def chunk_s(self, lease: Lease) -> float:
        """Seconds of one step that computes prompts only."""
        return self._estimator.chunk_s(lease)

    # The decode worker.

    def try_place(self, tracked: Tracked, assignment: Assignment, now_s: float, *, closed: ReplicaId | None = None) -> Placement | None:
        """Where the request runs from now on; None where no decode worker has room for it. None starts on `closed`."""
        output = self.output(tracked)
        _, leases = self._usable(tracked, now_s)
        if assignment.prefill and not leases:  # the last one has gone since
            assignment = replace(assignment, prefill=(), one_worker_reason=NO_DECODE_WORKER)
        considered: tuple[DecodeConsidered, ...] = ()
        if not assignment.prefill:
            decode = assignment.worker
            load = self._ledger.view(decode.replica_id)
            has_room = decode.replica_id != closed and self._estimator.has_room(decode, load, tracked.total_tokens, output)
            if not tracked.has_output and not has_room:
                return None
        else:
            considered = self._decode_considered(tracked, leases, output, assignment.worker, closed)
            if not considered:
                return None
            decode = min(considered, key=_rank).lease
        return self._placement(tracked, assignment, decode, considered, output, now_s)

    def roomiest(self, tracked: Tracked, now_s: float) -> Lease | None:
        """The decode worker with most free KV, room or not; for a prompt that one worker serves, that worker."""
        if tracked.assignment is not None and not tracked.assignment.prefill:
            return tracked.assignment.worker
        _, leases = self._usable(tracked, now_s)
        free = ((kv_room_tokens(lease) - self._ledger.view(lease.replica_id).kv_tokens, lease) for lease in leases)
        return max(free, key=lambda one: one[0], default=(0, None))[1]

    def output(self, tracked: Tracked) -> OutputEstimate:
        """Output tokens that the request is expected to have from here."""
        request = tracked.request
        produced = tracked.output_tokens + len(request.resume_token_ids)
        known, made_for = tracked.output, (produced, self._lengths.outcomes)
        if known is not None and known[0] == made_for:
            return known[1]
        estimate = self._lengths.estimate(
            tracked.length_key,
            produced_tokens=produced,
            max_tokens=request.sampling.max_tokens,
            expected_tokens=request.expected_output_tokens,
        )
        tracked.output = made_for, estimate
        return estimate

    def _decode_considered(
        self, tracked: Tracked, leases: Sequence[Lease], output: OutputEstimate, worker: Lease, closed: ReplicaId | None
    ) -> tuple[DecodeConsidered, ...]:
        """Decode workers with room, or of very many a few: predicted seconds from the first token of `worker` to the last.

        Those are too slow whose step would be longer than the TPOT objective of the request, or of one that decodes there.
        """
        estimator, rates, total_tokens = self._estimator, Rates(self._predictor), tracked.total_tokens
        gaps_s, steps = self._handoff_gaps_s(tracked, worker), max(1.0, output.mean_tokens)
        own_limit_s, limit_s = tracked.request.slo.tpot_s or inf, self._objectives.tpot_s
        considered = []
        for lease in self._shortlist.for_decode(leases):
            replica_id = lease.replica_id
            load = self._ledger.view(replica_id)
            if replica_id == closed or not estimator.has_room(lease, load, total_tokens, output):
                continue
            tpot_s, gap_s = estimator.tpot_s(rates, lease, load, total_tokens, output), gaps_s[lease.node == worker.node]
            is_too_slow = tpot_s > min(own_limit_s, limit_s(replica_id))
            rest_s = tpot_s * steps + gap_s
            considered.append(DecodeConsidered(lease, tpot_s, gap_s, rest_s, is_too_slow, load.running_requests, load.kv_tokens))
        return tuple(considered)

    def _work(self, lease: Lease, load: ReplicaLoad, tracked: Tracked) -> EngineWork:
        """The decode worker's, with this request in its batch."""
        return EngineWork(
            chunk_tokens=chunk_tokens(lease),
            pending_tokens=load.pending_prefill_tokens,
            decode_requests=load.running_requests + 1,
            kv_tokens=load.kv_tokens + tracked.total_tokens,
        )

    def _placement(
        self,
        tracked: Tracked,
        assignment: Assignment,
        decode: Lease,
        considered: tuple[DecodeConsidered, ...],
        output: OutputEstimate,
        now_s: float,
    ) -> Placement:
        predictor, model = self._predictor, tracked.request.model
        worker = assignment.worker
        is_same_node = worker.node == decode.node
        load = self._ledger.view(decode.replica_id)
        backlog_s = self.ahead_s(worker, now_s)
        prefill = predictor.prefill_behind(pool_of(worker), backlog_s=backlog_s + assignment.wait_s, own_s=assignment.own_s)
        tpot = predictor.tpot(
            pool_of(decode), decode.replica_id, self._work(decode, load, tracked), output_tokens=max(1.0, output.mean_tokens)
        )
        gap = None
        if assignment.prefill:
            gap = predictor.handoff_gap(model, blocks=self._blocks(tracked, decode), is_same_node=is_same_node)
        return Placement(
            assignment=assignment,
            prefill=tuple(lease for lease in assignment.prefill if self._fleet.is_taking(lease)),
            decode=decode,
            is_same_node=is_same_node,
            batch_requests=load.running_requests + 1,
            kv_tokens=load.kv_tokens + tracked.total_tokens,
            backlog_s=backlog_s,
            prefill_s=prefill,
            tpot=tpot,
            handoff_gap=gap,
            e2e=predictor.e2e(model, ttft=(tracked.first_assignment or assignment).ttft, tpot=tpot, output=output, handoff_gap=gap),
            output=output,
            considered=considered,
        )

    # Inside.

    def _usable(self, tracked: Tracked, now_s: float) -> tuple[Sequence[Lease], Sequence[Lease]]:
        """Ready prefill and decode workers that may have it."""
        model = tracked.request.model
        prefill, decode = self._fleet.ready(model, Role.PREFILL), self._fleet.ready(model, Role.DECODE)
        if not tracked.avoid and tracked.moved_from is None:
            return prefill, decode
        fresh_prefill, fresh_decode = _fresh(tracked, prefill), _fresh(tracked, decode)
        if fresh_prefill or fresh_decode or now_s < tracked.hold_until_s:
            return fresh_prefill, fresh_decode
        return prefill, decode

    def _one_worker_reason(self, tracked: Tracked, lease: Lease, *, has_prefill: bool, has_decode: bool) -> str:
        if not has_decode:
            return NO_DECODE_WORKER
        min_tokens = self._config.handoff_min_tokens
        if min_tokens is None:
            min_tokens = _HANDOFF_MIN_BLOCKS * lease.engine.block_size_tokens
        if tracked.total_tokens < min_tokens:
            return SHORT_PROMPT
        return tracked.one_worker_reason or ("" if has_prefill else NO_PREFILL_WORKER)

    def _considered(self, quote: Quote, leases: Sequence[Lease], *, is_one_worker: bool) -> list[Considered]:
        """What it would take on each of them, or on a few of very many."""
        consider = self._estimator.consider
        return [consider(quote, lease, is_one_worker=is_one_worker) for lease in self._shortlist.for_prompt(leases, quote.cached)]

    def _ranked(self, quote: Quote, leases: Sequence[Lease]) -> tuple[list[Considered], str]:
        """Prefill workers, best first, and the policy that ranked them: the configured one, another where seconds are not trusted."""
        policy = self._config.policy
        if policy == DEFAULT_POLICY and self._predictor.scores.is_trusted(quote.tracked.request.model):
            considered = self._considered(quote, leases, is_one_worker=False)
            considered.sort(key=lambda one: (one.total_s, one.lease.replica_id))
            return considered, policy
        if policy == DEFAULT_POLICY:
            policy, leases = _FALLBACK_POLICY, self._shortlist.for_prompt(leases, quote.cached)
        considered = [self._estimator.consider(quote, lease, is_one_worker=False) for lease in leases]
        job = self._job(quote.tracked, leases[0], quote.now_s)
        ranking = PEER_POLICIES[policy](job, [self._view(one) for one in considered], self._policy_state)
        return [considered[index] for index in ranking], policy

    def _one_worker_cost(self, quote: Quote, one: Considered, output: OutputEstimate) -> tuple[bool, float, int]:
        """Without room last, then the least seconds to the last expected token."""
        lease, load = one.lease, self._ledger.view(one.lease.replica_id)
        tpot_s = self._estimator.tpot_s(quote.rates, lease, load, quote.total_tokens, output)
        seconds = one.ahead_s + one.wait_s + one.own_s + tpot_s * output.mean_tokens
        return not self._estimator.has_room(lease, load, quote.total_tokens, output), seconds, load.running_requests

    def _quicker(self, quote: Quote, chosen: Considered, decode: Sequence[Lease]) -> Considered | None:
        """The decode worker that would do both sooner than two workers and a hand-off; None where none would."""
        tracked, max_tokens = quote.tracked, self._config.one_worker_max_tokens
        if max_tokens is not None and quote.total_tokens - chosen.cached_tokens > max_tokens:
            return None
        gaps_s, node = self._handoff_gaps_s(tracked, chosen.lease), chosen.lease.node
        few, limit_s = self._shortlist.for_prompt(decode, quote.cached), chosen.total_s + max(gaps_s)
        leases = self._estimator.those_that_may_take_less(quote, few, limit_s)
        considered = [self._estimator.consider(quote, lease, is_one_worker=True) for lease in leases]
        local = min(considered, key=lambda one: (one.total_s, one.lease.replica_id), default=None)
        if local is None or local.total_s >= chosen.total_s + gaps_s[local.lease.node == node]:
            return None
        load = self._ledger.view(local.lease.replica_id)
        return local if self._estimator.has_room(local.lease, load, quote.total_tokens, self.output(tracked)) else None

    def _assignment(
        self, quote: Quote, chosen: Considered, prefill: tuple[Lease, ...], reason: str, policy: str, considered: Sequence[Considered]
    ) -> Assignment:
        lease, tracked, now_s = chosen.lease, quote.tracked, quote.now_s
        model = tracked.request.model
        at_worker_s = min(chosen.ahead_s, self._config.ahead_s + self.chunk_s(lease))
        queue_s = self._predictor.line_s(pool_of(lease), ahead_s=chosen.ahead_s - at_worker_s, now_s=now_s)
        if tracked.slots_ahead_s > 0.0:
            replicas = len(self._fleet.ready(model, lease.role))
            queue_s = max(queue_s, self._predictor.queue_s(model, ahead_s=tracked.slots_ahead_s, replicas=replicas, now_s=now_s))
        queue = self._predictor.queue(model, queue_s)
        behind = self._predictor.prefill_behind(pool_of(lease), backlog_s=at_worker_s + chosen.wait_s, own_s=chosen.own_s)
        return Assignment(
            worker=lease,
            prefill=prefill,
            one_worker_reason=reason,
            policy=policy,
            cached_tokens=chosen.cached_tokens,
            uncached_tokens=max(1, tracked.total_tokens - chosen.cached_tokens),
            own_s=chosen.own_s,
            work_s=max(0.0, chosen.own_s - quote.rates[pool_of(lease)].prefill_fixed_s),
            ahead_s=chosen.ahead_s,
            is_guess=not self._predictor.pools.is_ready(pool_of(lease)),
            queue=queue,
            ttft=self._predictor.ttft(model, queue=queue, prefill=behind),
            considered=tuple(considered[:MAX_SCANNED]),
            wait_s=chosen.wait_s,
            stored=quote.cached.stores,
        )

    def _job(self, tracked: Tracked, lease: Lease, now_s: float) -> PrefillJob:
        pool, work = pool_of(lease), EngineWork(chunk_tokens=chunk_tokens(lease))

        def prefill_s(uncached_tokens: int, cached_tokens: int) -> float:
            return self._predictor.prefill_s(pool, "", work, uncached_tokens=uncached_tokens, cached_tokens=cached_tokens)

        return PrefillJob(
            prompt_tokens=tracked.total_tokens,
            prefill_s=prefill_s,
            session=tracked.request.session_id,
            block_size_tokens=lease.engine.block_size_tokens,
            now_s=now_s,
        )

    def _view(self, one: Considered) -> PrefillView:
        replica_id = one.lease.replica_id
        load, line = self._ledger.view(replica_id), self._lines.get(replica_id)
        waiting = 0 if line is None else len(line)
        waiting_tokens = 0 if line is None else line.tokens
        return PrefillView(
            replica_id=replica_id,
            cached_tokens=one.cached_tokens - one.fetched_tokens,
            ahead_s=one.ahead_s,
            ahead_tokens=load.pending_prefill_tokens + waiting_tokens,
            running_requests=load.running_requests + waiting,
            queued_requests=waiting,
            kv_tokens=load.kv_tokens,
            kv_room_tokens=kv_room_tokens(one.lease),
        )

    def _handoff_gaps_s(self, tracked: Tracked, worker: Lease) -> tuple[float, float]:
        """Of its hand-off from that worker: to another node, and to the same."""
        model, blocks = tracked.request.model, self._blocks(tracked, worker)
        gap_s = partial(self._predictor.handoff_gap_s, model, blocks=blocks)
        return gap_s(is_same_node=False), gap_s(is_same_node=True)

    def _blocks(self, tracked: Tracked, lease: Lease) -> int:
        return tracked.total_tokens // lease.engine.block_size_tokens


def _fresh(tracked: Tracked, leases: Sequence[Lease]) -> list[Lease]:
    holders = ((lease, (lease.replica_id, lease.incarnation)) for lease in leases)
    return [lease for lease, holder in holders if holder not in tracked.avoid and holder != tracked.moved_from]


def _rank(one: DecodeConsidered) -> tuple[bool, float, int, ReplicaId]:
    return one.rank
