"""The router's state machine: events in, instructions out. No clock, no I/O, no logging; `now_s` comes with each event.

A request is in one of three states, and unknown before and after:

  state     entered by                         left by
  QUEUED    submit, failed (retryable)         a placement -> RUNNING; tick (deadline, no replica) or cancelled -> ended
  RUNNING   a placement (Dispatch)             failed -> QUEUED or ended (Reject); finished or cancelled -> ended
  ended     forgotten at once; every later event about it, or about an older attempt of it, is ignored

Booking is at dispatch, release at the end of the attempt. Mutate only through the event methods; the shell carries out what they answer.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from random import Random

from router.admission import Admission
from router.config import RouterConfig
from router.fleet import Fleet
from router.instructions import Abandon, Dispatch, Instruction, Reject, ReplicaStatus
from router.ledger import Ledger
from router.moves import Moves
from router.placement import Placement
from router.planner import Planner, make_plan
from router.predict import Predictor
from router.prefix_index import Holder, PrefixIndex
from router.receipts import learn
from router.tracked import Tracked
from tandem.domain import BlockHash, Lease, ModelId, Receipt, ReplicaId, Request, RequestId, Stamp, WorkerLoad
from tandem.errors import DeadlineError, InvalidRequestError, Reason, TandemError, UnavailableError

# Ids that ended within the settle time; beyond 2,000 requests/s the oldest are forgotten, which costs a wrong count for a moment.
_MAX_ENDED = 10_000


class RouterCore:
    """All state of one router. `rng` names plans only; every choice is determined by the events."""

    def __init__(self, config: RouterConfig, rng: Random) -> None:
        self._config = config
        self._rng = rng
        self._fleet = Fleet()
        self._ledger = Ledger(config.stamp_settle_s)
        self._predictor = Predictor()
        self._prefixes = PrefixIndex(config.max_prefix_blocks)
        self._admission = Admission(max_queued_requests=config.max_queued_requests, max_running_requests=config.max_running_requests)
        self._planner = Planner(config, self._fleet, self._ledger, self._prefixes, self._predictor)
        self._moves = Moves(config, self._fleet, self._ledger)
        self._requests: dict[RequestId, Tracked] = {}
        self._ended: OrderedDict[RequestId, tuple[int, float]] = OrderedDict()  # last attempt and when, for the settle time

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

    def retry_after_s(self, model: ModelId | None) -> float:
        """When a caller refused now should come back: once the model's queue has passed, or its replica may have started.

        None: the model is not known.
        """
        if model is None or self._fleet.is_ready(model):
            queued = 0 if model is None else self._admission.queued_for(model)[0]
            return self._predictor.retry_after_s(queued, self._config.max_running_requests)
        return self._start_wait_s(model)

    def replicas(self) -> list[ReplicaStatus]:
        """Reachable replicas, by id."""
        return [self._status(lease) for lease in self._fleet.leases]

    def is_served(self, model: ModelId) -> bool:
        """Whether a replica of the model takes requests now."""
        return self._fleet.is_ready(model)

    def waiting_work(self) -> dict[ModelId, tuple[int, float]]:
        """By model: requests that wait here and the seconds of their prefill, as predicted when each began to wait."""
        return {model: self._admission.queued_for(model) for model in self._admission.models}

    # Events of requests.

    def submit(
        self, request: Request, *, block_hashes: Sequence[BlockHash], deadline_s: float | None, now_s: float, is_begun: bool = False
    ) -> list[Instruction]:
        """A new request, or (`is_begun`) a further part of one whose output has begun, which no full queue refuses.

        Raises InvalidRequestError where its id is in use, for then the id names another request.
        """
        request_id = request.request_id
        if request_id in self._requests:
            raise InvalidRequestError("request_id", f"a request {request_id!r} is being served")
        try:
            self._fleet.lease_for(request.model)
            self._admission.enqueue(
                request_id,
                model=request.model,
                priority=request.priority,
                deadline_s=deadline_s,
                now_s=now_s,
                work_s=self._prefill_s(request.model, request.total_tokens),
                retry_after_s=self.retry_after_s(request.model),
                is_begun=is_begun,
            )
        except TandemError as error:
            return [Reject(request_id=request_id, error=error)]
        ahead_requests = 0 if self._admission.has_slot else self.queued_requests
        attempts_before, _ = self._ended.pop(request_id, (0, 0.0))
        self._requests[request_id] = Tracked(
            request=request,
            attempts_before=attempts_before,
            attempt=attempts_before,
            block_hashes=block_hashes,
            deadline_s=deadline_s,
            predicted_queue_s=self._predictor.wait_s(ahead_requests, self._config.max_running_requests),
        )
        return self._pump(now_s)

    def tokens(self, request_id: RequestId, attempt: int, tokens: int, now_s: float) -> None:
        """`tokens` more output tokens were sent to the client. The first of an attempt tells that the prompt is computed.

        The prefill worker's part has ended then, and both workers hold the prompt's blocks.
        """
        found = self._running(request_id, attempt)
        if found is None:
            return
        tracked, placement = found
        tracked.output_tokens += tokens
        self._ledger.add_output(placement.decode.replica_id, tracked.key, tokens)
        if tracked.has_first_token:
            return
        tracked.has_first_token = True
        for lease in placement.prefill[:1]:
            self._ledger.release(lease.replica_id, tracked.key, now_s)
        for lease in (*placement.prefill[:1], placement.decode):
            self._prefixes.record(tracked.block_hashes, _holder(lease))

    def finished(self, request_id: RequestId, attempt: int, receipt: Receipt, now_s: float) -> list[Instruction]:
        """The attempt ended well; its receipt teaches the predictor."""
        found = self._running(request_id, attempt)
        if found is None:
            return []
        tracked, placement = found
        self._predictor.observe_request(now_s - tracked.dispatched_s)
        if tracked.attempt == tracked.attempts_before + 1:
            learn(self._predictor, tracked.request, placement, receipt)
        self._end(tracked, now_s)
        return self._pump(now_s)

    def failed(self, request_id: RequestId, attempt: int, error: TandemError, now_s: float) -> list[Instruction]:
        """The attempt failed: the request waits for another worker, or ends where another cannot help."""
        found = self._running(request_id, attempt)
        if found is None:
            return []
        tracked, placement = found
        tracked.moves += tracked.is_moving
        final = tracked.final_error(error, retry_budget=self._config.retry_budget, now_s=now_s)
        if final is not None:
            return [self._refuse(tracked, final, now_s), *self._pump(now_s)]
        self._release(tracked, now_s)
        if tracked.is_moving:
            tracked.moved_from = _holder(placement.decode)
        else:
            tracked.avoid.add(_holder(placement.decode))
        tracked.hold_until_s = now_s + self._config.retry_hold_s
        self._admission.wait_again(request_id, now_s=now_s, work_s=self._prefill_s(tracked.request.model, tracked.total_tokens))
        return self._pump(now_s)

    def cancelled(self, request_id: RequestId, now_s: float) -> list[Instruction]:
        """The caller is gone, or is done with it; again is no harm."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return []
        self._end(tracked, now_s)
        return self._pump(now_s)

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
            self._ledger.add_replica(lease.replica_id, lease.incarnation)
        return [*instructions, *self._pump(now_s)]

    def replica_lost(self, replica_id: ReplicaId, incarnation: int, now_s: float) -> list[Instruction]:
        """The replica does not answer: it gets no more requests, and those it decodes are to be abandoned."""
        lease = self._fleet.get(replica_id)
        if lease is None or lease.incarnation != incarnation:
            return []
        return self._lose(lease, now_s)

    def report(self, replica_id: ReplicaId, incarnation: int, sequence: int, load: WorkerLoad | None, stamps: Sequence[Stamp]) -> bool:
        """A replica's totals and stamps; False where they are not believed (older, or of another incarnation)."""
        return self._ledger.report(replica_id, incarnation, sequence, load, stamps)

    def tick(self, now_s: float) -> list[Instruction]:
        """Ends requests that wait in vain, forgets stamps that do not come, places what may be placed."""
        instructions: list[Instruction] = []
        for request_id in self._admission.expired(now_s):
            instructions.append(self._refuse(self._requests[request_id], DeadlineError("queue"), now_s))
        for model in self._admission.models:
            instructions += self._refuse_in_vain(model, now_s)
        self._ledger.expire(now_s)
        self._forget_ended(now_s)
        return [*instructions, *self._move(now_s), *self._pump(now_s)]

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

    def _refuse_in_vain(self, model: ModelId, now_s: float) -> list[Reject]:
        """Ends the requests that wait for a model that no replica comes for, and those that have waited for one too long."""
        error, until_s = self._fleet.refusal(model), now_s
        unserved_s = self._fleet.unserved_s(model, now_s)
        if error is None:
            wait_s = self._start_wait_s(model)
            if unserved_s is None or unserved_s < wait_s:
                return []
            message = f"no replica of model {model!r} has been ready for {unserved_s:.1f} s"
            error = UnavailableError(message, reason=Reason.NO_REPLICA, retry_after_s=self._config.no_replica_wait_s)
            until_s = now_s - wait_s
        return [self._refuse(self._requests[request_id], error, now_s) for request_id in self._admission.waiting_since(model, until_s)]

    def _start_wait_s(self, model: ModelId) -> float:
        """How long a request may wait for the first replica of a model."""
        return self._config.cold_start_wait_s if self._fleet.is_held(model) else self._config.no_replica_wait_s

    def _prefill_s(self, model: ModelId, tokens: int) -> float:
        return self._predictor.prefill_s(model, uncached_tokens=tokens, context_tokens=tokens)

    def _pump(self, now_s: float) -> list[Instruction]:
        """Dispatches, in line order, every waiting request that has a slot and a worker. Who waits for other models costs nothing."""
        instructions: list[Instruction] = []
        if not self._admission.has_slot:
            return instructions
        for request_id in self._admission.waiting(model for model in self._admission.models if self._fleet.is_ready(model)):
            tracked = self._requests[request_id]
            placement = self._planner.try_place(tracked, now_s)
            if placement is not None:
                instructions.append(self._dispatch(tracked, placement, now_s))
                if not self._admission.has_slot:
                    break
        return instructions

    def _dispatch(self, tracked: Tracked, placement: Placement, now_s: float) -> Dispatch:
        request_id = tracked.request.request_id
        self._admission.start(request_id)
        tracked.attempt += 1
        tracked.placement = placement
        tracked.has_first_token = False
        tracked.is_moving, tracked.moved_from = False, None
        tracked.dispatched_s = now_s
        for lease in placement.prefill[:1]:
            self._ledger.book(lease.replica_id, tracked.key, prefill_tokens=placement.uncached_tokens, kv_tokens=tracked.total_tokens)
        decode_prefill_tokens = 0 if placement.prefill else placement.uncached_tokens
        self._ledger.book(placement.decode.replica_id, tracked.key, prefill_tokens=decode_prefill_tokens, kv_tokens=tracked.total_tokens)
        plan = make_plan(tracked, placement, self._config, plan_id=f"{self._rng.getrandbits(64):016x}", now_s=now_s)
        return Dispatch(request_id=request_id, attempt=tracked.attempt, plan=plan)

    def _running(self, request_id: RequestId, attempt: int) -> tuple[Tracked, Placement] | None:
        """The request where it is RUNNING in this attempt."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.placement is None or tracked.attempt != attempt:
            return None
        return tracked, tracked.placement

    def _release(self, tracked: Tracked, now_s: float) -> None:
        if tracked.placement is not None:
            for lease in (*tracked.placement.prefill[:1], tracked.placement.decode):
                self._ledger.release(lease.replica_id, tracked.key, now_s)
            tracked.placement = None

    def _end(self, tracked: Tracked, now_s: float) -> None:
        request_id = tracked.request.request_id
        self._release(tracked, now_s)
        self._admission.end(request_id)
        del self._requests[request_id]
        self._ended[request_id] = (tracked.attempt, now_s)
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    def _forget_ended(self, now_s: float) -> None:
        while self._ended:
            request_id, (_, ended_s) = next(iter(self._ended.items()))
            if now_s - ended_s < self._config.stamp_settle_s:
                return
            del self._ended[request_id]

    def _refuse(self, tracked: Tracked, error: TandemError, now_s: float) -> Reject:
        self._end(tracked, now_s)
        return Reject(request_id=tracked.request.request_id, error=error)

    def _lose(self, lease: Lease, now_s: float) -> list[Instruction]:
        self._fleet.lose(lease.replica_id, lease.incarnation, now_s)
        self._ledger.remove_replica(lease.replica_id)
        error = UnavailableError(f"replica {lease.replica_id} was lost", reason=Reason.WORKER_LOST)
        return [
            Abandon(request_id=request_id, attempt=tracked.attempt, error=error)
            for request_id, tracked in self._requests.items()
            if tracked.placement is not None and _holder(tracked.placement.decode) == _holder(lease)
        ]

    def _status(self, lease: Lease) -> ReplicaStatus:
        view = self._ledger.view(lease.replica_id)
        work_s = self._predictor.backlog_s(lease.model, view.pending_prefill_tokens)
        return ReplicaStatus(lease=lease, load=self._ledger.reported(lease.replica_id), predicted_work_s=work_s)

    def check_invariants(self) -> None:
        """What must hold between any two events; O(everything). Raises AssertionError."""
        self._admission.check_invariants()
        self._ledger.check_invariants()
        assert len(self._prefixes) <= self._config.max_prefix_blocks, "the prefix index is over its bound"
        assert len(self._ended) <= _MAX_ENDED, "more ended requests are remembered than may be"
        queued = {request_id for request_id, tracked in self._requests.items() if tracked.placement is None}
        assert queued == set(self._admission.waiting(self._admission.models)), "queue and requests disagree on who waits"
        assert len(self._requests) - len(queued) == self.running_requests, "queue and requests disagree on who runs"
        for lease in self._fleet.leases:
            for request_id, attempt in self._ledger.open_bookings(lease.replica_id):
                tracked = self._requests[request_id]
                assert tracked.placement is not None, f"{request_id} is booked on {lease.replica_id} and waits"
                assert tracked.attempt == attempt, f"{request_id} is booked on {lease.replica_id} for an old attempt"


def _holder(lease: Lease) -> Holder:
    return lease.replica_id, lease.incarnation
