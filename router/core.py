"""The router's state machine: events in, instructions out. No clock, no I/O, no logging; `now_s` comes with each event.

A request is in one of three states, and unknown before and after:

  state     entered by                         left by
  QUEUED    submit, failed (retryable)         a placement -> RUNNING; tick (deadline, no replica, hopeless) or cancelled -> ended
  RUNNING   a placement (Dispatch)             failed -> QUEUED or ended (Reject); finished or cancelled -> ended
  ended     forgotten at once; every later event about it, or about an older attempt of it, is ignored

A queued request waits in the line of the worker that was chosen for its prompt, and is dispatched when that has little left to do.
Booking is at dispatch, release at the end of the attempt. Mutate only through the event methods; the shell carries out what they answer.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from random import Random

from router.admission import Admission
from router.backlog import Backlog
from router.block_table import BindProbe
from router.bookings import Bookings
from router.config import RouterConfig
from router.decisions import Decisions
from router.estimator import pool_of
from router.fleet import Fleet
from router.hot_prefixes import HotPrefixes
from router.instructions import Abandon, CopyPrefix, Dispatch, Instruction, Reject, ReplicaStatus
from router.ledger import Ledger
from router.lines import Lines
from router.moves import Moves
from router.objectives import Objectives
from router.output_length import OutputLengths
from router.placement import Assignment, Placement
from router.plan import make_plan
from router.planner import Planner
from router.plausible import is_possible_load, possible_steps
from router.policies import PolicyParameters
from router.predict import LoadPredictor
from router.prefix_index import PrefixIndex, StoreHolder, holder_of
from router.prospects import Prospects
from router.receipts import learn
from router.recent_ids import RecentIds
from router.tenants import FairShares, RouterShares
from router.tracked import Tracked
from router.turns import Turns
from tandem.domain import BlockHash, Lease, ModelId, Namespace, Receipt, ReplicaId, ReplicaState, Request, RequestId, Stamp, WorkerLoad
from tandem.errors import DeadlineError, InvalidRequestError, OverloadedError, Reason, TandemError, UnavailableError
from tandem.held_blocks import BlockChange
from tandem.step_sample import StepSample


class RouterCore:
    """All state of one router. `rng` names plans and draws candidates; with the same one, the same events give the same decisions.

    `weights` are fair shares of tenants; 1 where none is given. `parameters` are other routers' policies', `bind_probe` finds blocks.
    """

    def __init__(
        self,
        config: RouterConfig,
        rng: Random,
        *,
        weights: Mapping[str, float] | None = None,
        predictor: LoadPredictor | None = None,
        parameters: PolicyParameters | None = None,
        bind_probe: BindProbe | None = None,
    ) -> None:
        self._config = config
        self._rng = rng
        self._fleet = Fleet()
        self._ledger = Ledger(config.stamp_settle_s)
        backlog, objectives = Backlog(), Objectives()
        self._lines = Lines()
        self._tenants = FairShares({} if weights is None else weights)
        self._bookings = Bookings(self._ledger, backlog, objectives, self._tenants)
        self._tenant_requests: Counter[str] = Counter()
        self._lengths = OutputLengths()
        self.predictor = predictor or LoadPredictor()
        self._prefixes = PrefixIndex(config.max_prefix_blocks, bind_probe)
        self._admission = Admission(max_queued_requests=config.max_queued_requests, max_running_requests=config.max_running_requests)
        self._prospects = Prospects(config, self._fleet, self._admission, self.predictor)
        self._planner = Planner(
            config,
            fleet=self._fleet,
            ledger=self._ledger,
            backlog=backlog,
            lines=self._lines.by_worker,
            prefixes=self._prefixes,
            predictor=self.predictor,
            lengths=self._lengths,
            rng=rng,
            shares=self._tenants,
            parameters=parameters or PolicyParameters(),
            objectives=objectives,
        )
        self._moves = Moves(config, self._fleet, self._ledger)
        self._requests: dict[RequestId, Tracked] = {}
        self._arrivals = 0
        self._turns = Turns(config, self._fleet, self._planner, self._lines, self._tenants, self._requests, backlog, self.predictor)
        self._recent = RecentIds(config.stamp_settle_s)
        self.decisions = Decisions(config.max_explained_requests)
        self.hot_prefixes = HotPrefixes(config, self.predictor)

    # What the shell may ask.

    @property
    def fleet(self) -> Fleet:
        """Replicas and models, to read."""
        return self._fleet

    @property
    def queued_requests(self) -> int:
        """Requests that wait here."""
        return self._admission.queued_requests

    @property
    def running_requests(self) -> int:
        """Requests that are dispatched."""
        return self._admission.running_requests

    def retry_after_s(self, model: ModelId | None, now_s: float) -> float:
        """When a caller refused now should come back. None: the model is not known."""
        return self._prospects.retry_after_s(model, now_s)

    def replicas(self, now_s: float) -> list[ReplicaStatus]:
        """Reachable replicas, by id."""
        return [self._planner.status(lease, now_s) for lease in self._fleet.leases]

    def is_served(self, model: ModelId) -> bool:
        """Whether a replica of the model takes requests now."""
        return self._fleet.is_ready(model)

    def waiting_work(self) -> dict[ModelId, tuple[int, float]]:
        """By model: requests that wait here and the seconds of their prefill, as predicted when each began to wait."""
        return {model: self._admission.queued_for(model) for model in self._admission.models}

    @property
    def prefixes(self) -> PrefixIndex:
        """Who holds which blocks, to read."""
        return self._prefixes

    # Events of requests.

    def submit(
        self, request: Request, *, block_hashes: Sequence[BlockHash], deadline_s: float | None, now_s: float, is_begun: bool = False
    ) -> list[Instruction]:
        """A new request, or (`is_begun`) a further part of one whose output has begun, which no full queue refuses.

        Raises InvalidRequestError where its id is in use, for then the id names another request.
        """
        request_id, model, assignment = request.request_id, request.model, None
        if request_id in self._requests:
            raise InvalidRequestError("request_id", f"a request {request_id!r} is being served")
        try:
            self._fleet.lease_for(model)
            if not is_begun:
                come_back = partial(self._prospects.retry_after_s, model, now_s)
                self._admission.check_room(model, deadline_s=deadline_s, now_s=now_s, retry_after_s=come_back)
            attempts_before = self._recent.last_attempt(request_id)
            self._arrivals += 1
            ttft_s = self._config.default_ttft_s if request.slo.ttft_s is None else request.slo.ttft_s
            tracked = Tracked(
                request=request,
                attempts_before=attempts_before,
                attempt=attempts_before,
                block_hashes=block_hashes,
                deadline_s=deadline_s,
                arrived_s=now_s,
                arrival=self._arrivals,
                first_token_due_s=now_s + ttft_s,
            )
            if not self._admission.has_slot:
                tracked.slots_ahead_s = self._admission.queued_for(model)[1]
            assignment = self._planner.try_assign(tracked, now_s)
            if assignment is not None and not is_begun:
                self._prospects.check(tracked, assignment, now_s)
        except TandemError as error:
            self.decisions.refused(request_id, error, assignment)
            return [Reject(request_id=request_id, error=error)]
        self._recent.begun(request_id)
        self._requests[request_id] = tracked
        self._tenant_requests[request.tenant] += 1
        self._tenants.activate(request.tenant)
        tracked.is_predicted = assignment is not None and not is_begun  # choices after the first are timed from the first's arrival
        self.decisions.began(tracked)
        work_s = self._turns.line_up(tracked, assignment, now_s)
        self._admission.enqueue(request_id, model=model, deadline_s=deadline_s, now_s=now_s, work_s=work_s)
        copies = self.hot_prefixes.note(tracked, assignment, now_s)
        return [*copies, *self._pump(now_s, _worker_of(assignment), model)]

    def tokens(self, request_id: RequestId, attempt: int, tokens: int, now_s: float) -> list[Instruction]:
        """`tokens` more output tokens were sent to the client. The first of an attempt tells that the prompt is computed.

        The prefill worker's part has ended then: it may be given the next prompt, and both workers hold this one's blocks.
        """
        found = self._running(request_id, attempt)
        if found is None:
            return []
        tracked, placement = found
        tracked.output_tokens += tokens
        self._bookings.add_output(tracked, placement, tokens)
        if tracked.has_first_token:
            return []
        tracked.has_first_token = True
        self._bookings.prompt_computed(tracked, placement, now_s)
        living = [lease for lease in (*placement.prefill[:1], placement.decode) if self._fleet.is_known(lease)]
        if living:
            self._prefixes.record(tracked.block_keys, *map(holder_of, living))
        return self._pump(now_s, placement.worker_ids)

    def finished(self, request_id: RequestId, attempt: int, receipt: Receipt, now_s: float) -> list[Instruction]:
        """The attempt ended well; its receipt teaches the predictor."""
        found = self._running(request_id, attempt)
        if found is None:
            return []
        tracked, placement = found
        if tracked.attempt == tracked.attempts_before + 1:
            learn(self.predictor, self._lengths, tracked, receipt, now_s)
        planned = placement.worker
        if receipt.prefill_replica_id not in ("", planned.replica_id):  # another stepped in: `planned` has what it had before
            cached_blocks = placement.assignment.cached_tokens // planned.engine.block_size_tokens
            self._prefixes.correct(tracked.block_hashes, holder_of(planned), cached_blocks)
        self._end(tracked, receipt, now_s)
        return self._pump(now_s, placement.worker_ids)

    def failed(self, request_id: RequestId, attempt: int, error: TandemError, now_s: float) -> list[Instruction]:
        """The attempt failed: the request waits for another worker, or ends where another cannot help."""
        found = self._running(request_id, attempt)
        if found is None:
            return []
        tracked, placement = found
        tracked.moves += tracked.is_moving
        final = tracked.final_error(error, retry_budget=self._config.retry_budget, now_s=now_s)
        if final is not None:
            return [self._refuse(tracked, final, now_s), *self._pump(now_s, placement.worker_ids)]
        self._release(tracked, now_s)
        if tracked.is_moving:
            tracked.moved_from = holder_of(placement.decode)
        else:
            tracked.avoid.add(holder_of(placement.decode))
        tracked.hold_until_s = now_s + self._config.retry_hold_s
        assignment = self._planner.try_assign(tracked, now_s)
        work_s = self._turns.line_up(tracked, assignment, now_s)
        self._admission.wait_again(request_id, now_s=now_s, work_s=work_s)
        return self._pump(now_s, (*placement.worker_ids, *_worker_of(assignment)), tracked.request.model)

    def cancelled(self, request_id: RequestId, now_s: float) -> list[Instruction]:
        """The caller is gone, or is done with it; again is no harm."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return []
        placement = tracked.placement
        self._end(tracked, None, now_s)
        return self._pump(now_s, () if placement is None else placement.worker_ids)

    # Events of replicas and of time.

    def models_held(self, models: Iterable[ModelId], refused: Mapping[ModelId, str]) -> None:
        """Models for which somebody starts replicas on demand: their requests may wait for that. `refused`: why others may not."""
        self._fleet.hold(models, refused)

    def replica_seen(self, lease: Lease, now_s: float) -> list[Instruction]:
        """A lease, new or changed. A newer incarnation ends the older one; an older one is ignored."""
        if self._fleet.is_stale(lease):
            return []
        known = self._fleet.get(lease.replica_id)
        instructions: list[Instruction] = []
        if known is not None and known.incarnation != lease.incarnation:
            instructions = self._lose(known, now_s)
            known = None
        self._fleet.see(lease, now_s)
        if known is None:
            self._bookings.add_replica(lease)
        if lease.state is not ReplicaState.READY:
            self._turns.scatter(lease.replica_id, now_s)
        instructions += self._pump(now_s, (lease.replica_id, *self._turns.house(lease.model, now_s)))
        self._note_queue(lease.model, now_s)
        return instructions

    def replica_lost(self, replica_id: ReplicaId, incarnation: int, now_s: float) -> list[Instruction]:
        """The replica does not answer: it gets no more requests, and those it decodes are to be abandoned."""
        lease = self._fleet.get(replica_id)
        if lease is None or lease.incarnation != incarnation:
            return []
        return self._lose(lease, now_s)

    def report(self, replica_id: ReplicaId, incarnation: int, sequence: int, load: WorkerLoad | None, stamps: Sequence[Stamp]) -> bool:
        """A replica's totals and stamps; False where they are not believed: older, of another incarnation, impossible."""
        lease = self._fleet.get(replica_id)
        if lease is None or (load is not None and not is_possible_load(load, lease.engine)):
            return False
        is_believed = self._ledger.report(replica_id, incarnation, sequence, load, stamps)
        self._planner.note_load(replica_id)
        return is_believed

    def steps(self, replica_id: ReplicaId, incarnation: int, samples: Sequence[StepSample], now_s: float) -> bool:
        """Steps that a replica measured; False where some are not believed: impossible, or of an unknown incarnation."""
        lease = self._fleet.get(replica_id)
        if lease is None or lease.incarnation != incarnation:
            return False
        possible = possible_steps(samples, lease.engine)
        self.predictor.pools.observe(pool_of(lease), replica_id, possible, now_s)
        return len(possible) == len(samples)

    def cached(self, replica_id: ReplicaId, incarnation: int, change: BlockChange) -> bool:
        """What changed in a replica's own cache; False where it is not believed: it is not known in that incarnation."""
        lease = self._fleet.get(replica_id)
        if lease is None or lease.incarnation != incarnation:
            return False
        self._prefixes.tell(holder_of(lease), change)
        return True

    def stored(self, node: str, namespace: Namespace, change: BlockChange) -> None:
        """What changed in a node's store."""
        self._prefixes.tell(StoreHolder(node, namespace), change)

    def store_lost(self, node: str) -> None:
        """What the node's store holds is not known any more."""
        self._prefixes.drop_node(node)

    def stores_known(self, nodes: Collection[str]) -> None:
        """The nodes that have a store service now."""
        self.hot_prefixes.stores_known(nodes)

    def copy_ended(self, copy: CopyPrefix, now_s: float, *, is_whole: bool) -> None:
        """A copy has ended; `is_whole`: all its blocks are there."""
        self.hot_prefixes.ended(copy, now_s, is_whole=is_whole)

    def shares(self) -> RouterShares:
        """What tenants were served by this router, and who waits here: for the other routers."""
        return self._tenants.told({self._requests[request_id].request.tenant for request_id in self._lines.requests})

    def shares_heard(self, others: Mapping[str, RouterShares]) -> None:
        """The same of the other routers that live."""
        self._tenants.heard(others)

    def tick(self, now_s: float) -> list[Instruction]:
        """Ends requests that wait in vain, forgets stamps that do not come, places what may be placed."""
        instructions: list[Instruction] = []
        for request_id in self._admission.expired(now_s):
            instructions.append(self._refuse(self._requests[request_id], DeadlineError("queue"), now_s))
        for model in self._admission.models:
            instructions += [self._refuse(self._requests[one], error, now_s) for one, error in self._prospects.in_vain(model, now_s)]
        self._ledger.expire(now_s)
        self._recent.expire(now_s)
        instructions += self._move(now_s)
        for model in self._lines.homeless_models:
            self._turns.house(model, now_s)
        self._turns.rethink(now_s)
        return [*instructions, *self._pump(now_s, tuple(self._lines))]

    # Inside.

    def _move(self, now_s: float) -> list[Abandon]:
        """Ends the attempts of requests that are to go on elsewhere."""
        instructions = []
        for tracked in self._moves.due(self._requests.values(), now_s):
            assert tracked.placement is not None
            tracked.is_moving = True
            error = UnavailableError(f"replica {tracked.placement.decode.replica_id} gives the request to another", reason=Reason.MOVED)
            instructions.append(Abandon(request_id=tracked.request.request_id, attempt=tracked.attempt, error=error))
        return instructions

    def _pump(self, now_s: float, touched: Iterable[ReplicaId] = (), model: ModelId | None = None) -> list[Instruction]:
        """Dispatches whoever may go, from the lines of workers whose work has changed and from those that lacked a slot or room.

        `model`: that whose queue has changed otherwise.
        """
        instructions: list[Instruction] = []
        for replica_id in touched:
            self._planner.note_load(replica_id)
        for replica_id in self._turns.lines_due(touched, now_s):
            while (turn := self._turns.try_next(replica_id, now_s, has_slot=self._admission.has_slot)) is not None:
                if turn.placement is None:
                    instructions.append(self._shed(turn.tracked, now_s))
                else:
                    instructions.append(self._dispatch(turn.tracked, turn.placement, now_s))
        if model is not None:
            self._note_queue(model, now_s)
        return instructions

    def _shed(self, tracked: Tracked, now_s: float) -> Reject:
        """The second look at a sheddable request: its turn has come too late."""
        retry_after_s = self._prospects.retry_after_s(tracked.request.model, now_s)
        words = "its turn came too late for its TTFT objective"
        return self._refuse(tracked, OverloadedError(words, retry_after_s=retry_after_s, reason=Reason.PREDICTED_LATE), now_s)

    def _dispatch(self, tracked: Tracked, placement: Placement, now_s: float) -> Dispatch:
        request, assignment = tracked.request, placement.assignment
        self._turns.go(tracked, now_s)
        self._admission.start(request.request_id)
        tracked.attempt += 1
        tracked.placement = placement
        tracked.has_first_token = False
        tracked.is_moving, tracked.moved_from = False, None
        tracked.dispatched_s = now_s
        self._bookings.begin(tracked, placement, now_s)
        self.predictor.dispatched(request.model, assignment.work_s, now_s, is_guess=assignment.is_guess)
        self._note_queue(request.model, now_s)
        plan = make_plan(tracked, placement, self._config, plan_id=f"{self._rng.getrandbits(64):016x}", now_s=now_s)
        self.decisions.placed(tracked, plan, placement)
        for replica_id in placement.worker_ids:
            self._planner.note_load(replica_id)
        return Dispatch(request_id=request.request_id, attempt=tracked.attempt, plan=plan)

    def _note_queue(self, model: ModelId, now_s: float) -> None:
        """Whether anything waits for the model now; a wait for its first replica says nothing of how fast its queue moves."""
        is_waiting = self._fleet.is_ready(model) and self._admission.queued_for(model)[0] > 0
        self.predictor.note_queue(model, is_waiting=is_waiting, now_s=now_s)

    def _running(self, request_id: RequestId, attempt: int) -> tuple[Tracked, Placement] | None:
        """The request where it is RUNNING in this attempt."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.placement is None or tracked.attempt != attempt:
            return None
        return tracked, tracked.placement

    def _release(self, tracked: Tracked, now_s: float) -> None:
        if tracked.placement is not None:
            self._bookings.end(tracked, tracked.placement, now_s)
            tracked.placement = None

    def _end(self, tracked: Tracked, outcome: Receipt | TandemError | None, now_s: float) -> None:
        request_id = tracked.request.request_id
        self.decisions.ended(tracked, outcome)
        self._release(tracked, now_s)
        self._turns.leave(tracked)
        self._admission.end(request_id)
        self._note_queue(tracked.request.model, now_s)
        del self._requests[request_id]
        tenant = tracked.request.tenant
        self._tenant_requests[tenant] -= 1
        if not self._tenant_requests[tenant]:
            del self._tenant_requests[tenant]
            self._tenants.deactivate(tenant)
        self._recent.ended(request_id, tracked.attempt, now_s)

    def _refuse(self, tracked: Tracked, error: TandemError, now_s: float) -> Reject:
        self._end(tracked, error, now_s)
        return Reject(request_id=tracked.request.request_id, error=error)

    def _lose(self, lease: Lease, now_s: float) -> list[Instruction]:
        self._fleet.lose(lease.replica_id, lease.incarnation, now_s)
        self._bookings.remove_replica(lease.replica_id)
        self.predictor.pools.forget_replica(pool_of(lease), lease.replica_id)
        self._prefixes.drop(holder_of(lease))
        self._planner.note_load(lease.replica_id)
        self._turns.scatter(lease.replica_id, now_s)
        self._note_queue(lease.model, now_s)
        error = UnavailableError(f"replica {lease.replica_id} was lost", reason=Reason.WORKER_LOST)
        return [
            Abandon(request_id=request_id, attempt=tracked.attempt, error=error)
            for request_id, tracked in self._requests.items()
            if tracked.placement is not None and holder_of(tracked.placement.decode) == holder_of(lease)
        ]

    def check_invariants(self) -> None:
        """What must hold between any two events; O(everything). Raises AssertionError."""
        self._admission.check_invariants()
        self._bookings.check_invariants(self._fleet.leases, self._requests)
        self._lines.check_invariants()
        assert len(self._prefixes) <= self._config.max_prefix_blocks, "the prefix index is over its bound"
        reachable = set(map(holder_of, self._fleet.leases))
        assert reachable.issuperset(self._prefixes.replicas), "the prefix index knows replicas that are gone"
        queued = {request_id for request_id, tracked in self._requests.items() if tracked.placement is None}
        assert queued == set(self._lines.requests), "lines and requests disagree on who waits"
        assert len(queued) == self.queued_requests, "queue and requests disagree on how many wait"
        assert set(self._tenants.active) == set(self._tenant_requests), "tenants without requests are active"
        assert len(self._requests) - len(queued) == self.running_requests, "queue and requests disagree on who runs"


def _worker_of(assignment: Assignment | None) -> tuple[ReplicaId, ...]:
    return () if assignment is None else (assignment.worker.replica_id,)
