"""After any sequence of events the core has leaked nothing, dispatched nothing twice, and kept its bounds.

Workers accept late or never, reports come late, twice or not at all, callers cancel, replicas die and come back.
"""

from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, Dispatch, Instruction, Reject
from tandem.domain import BlockHash, ModelId, Receipt, ReplicaId, ReplicaState, RequestId, Role, Sampling, Stamp, StampKind, WorkerLoad
from tandem.errors import EngineError, InvalidRequestError, ProtocolError, TandemError
from tests.samples import make_lease, make_request

CONFIG = RouterConfig(max_queued_requests=4, max_running_requests=3, max_prefix_blocks=20, no_replica_wait_s=3.0, stamp_settle_s=4.0)
REPLICAS = (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE), ("n0", Role.DECODE))
N = ModelId("n")  # a second model: of the replica n0, for the requests g and h
FAILURES: tuple[TandemError, ...] = (EngineError("died"), ProtocolError("gap"))


class RouterEvents(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize()
    def begin(self) -> None:
        self.core = RouterCore(CONFIG, Random(0))
        self.now_s = 0.0
        self.open: set[RequestId] = set()  # submitted, and neither ended by us nor rejected
        self.running: dict[RequestId, int] = {}  # the attempt whose end we owe
        self.used_s: dict[tuple[RequestId, int], float] = {}  # attempts that ended, and when
        self.up: dict[str, int] = {}
        self.incarnation = 0
        self.sequence = 0

    def _obey(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            request_id = instruction.request_id
            match instruction:
                case Dispatch():
                    assert request_id in self.open, "a request that has ended was dispatched"
                    assert request_id not in self.running, "a request was dispatched twice"
                    last_s = self.used_s.get((request_id, instruction.attempt), -CONFIG.stamp_settle_s)
                    assert self.now_s - last_s >= CONFIG.stamp_settle_s, "an attempt number was used twice within the settle time"
                    assert {worker.replica_id for worker in (*instruction.plan.prefill, instruction.plan.decode)} <= set(self.up)
                    self.running[request_id] = instruction.attempt
                case Reject():
                    assert request_id in self.open, "a request ended twice"
                    self.open.remove(request_id)
                    self._stop(request_id)
                case Abandon():
                    assert self.running[request_id] == instruction.attempt
                    self._stop(request_id)
                    self._obey(self.core.failed(request_id, instruction.attempt, instruction.error, self.now_s))

    @rule(
        target=requests,
        name=st.sampled_from("abcdefgh"),
        priority=st.integers(-1, 1),
        prompt_tokens=st.sampled_from((1, 70, 300)),
        patience_s=st.none() | st.floats(0.0, 5.0),
        n=st.sampled_from((1, 1, 2)),
    )
    def submit(self, name: str, priority: int, prompt_tokens: int, patience_s: float | None, n: int) -> object:
        request = make_request(name, prompt_tokens, Sampling(max_tokens=8, n=n), priority=priority)
        request = replace(request, model=N) if name in "gh" else request
        hashes = [BlockHash(bytes([prompt_tokens % 256, index])) for index in range(prompt_tokens // 32)]
        deadline_s = None if patience_s is None else self.now_s + patience_s
        is_running = request.request_id in self.open
        self.open.add(request.request_id)
        try:
            self._obey(self.core.submit(request, block_hashes=hashes, deadline_s=deadline_s, now_s=self.now_s))
        except InvalidRequestError:
            assert is_running
            return multiple()
        return request.request_id

    @rule(request_id=requests, tokens=st.integers(1, 3), attempts_ago=st.sampled_from((0, 0, 0, 1)))
    def tokens(self, request_id: RequestId, tokens: int, attempts_ago: int) -> None:
        self.core.tokens(request_id, self.running.get(request_id, 1) - attempts_ago, tokens, self.now_s)

    @rule(request_id=requests)
    def finish(self, request_id: RequestId) -> None:
        attempt = self._stop(request_id)
        if attempt is not None:
            self.open.remove(request_id)
            receipt = Receipt(request_id=request_id, prefill_s=0.1, ttft_s=0.2, e2e_s=1.0, output_tokens=5)
            self._obey(self.core.finished(request_id, attempt, receipt, self.now_s))

    @rule(request_id=requests, failure=st.sampled_from(FAILURES), attempts_ago=st.sampled_from((0, 0, 0, 1)))
    def fail(self, request_id: RequestId, failure: TandemError, attempts_ago: int) -> None:
        attempt = self.running.get(request_id)
        if attempt is None or attempts_ago:
            assert self.core.failed(request_id, 0 if attempt is None else attempt - 1, failure, self.now_s) == []
            return
        self._stop(request_id)
        self._obey(self.core.failed(request_id, attempt, failure, self.now_s))

    @rule(request_id=consumes(requests))
    def cancel(self, request_id: RequestId) -> None:
        self._end(request_id)

    @rule(replica=st.sampled_from(REPLICAS), state=st.sampled_from((ReplicaState.READY, ReplicaState.READY, ReplicaState.DRAINING)))
    def replica_seen(self, replica: tuple[str, Role], state: ReplicaState) -> None:
        name, role = replica
        if name not in self.up:
            self.incarnation += 1
            self.up[name] = self.incarnation
        lease = make_lease(name, role, self.up[name], state=state)
        self._obey(self.core.replica_seen(replace(lease, model=N) if name == "n0" else lease, self.now_s))

    @rule(replica=st.sampled_from(REPLICAS))
    def replica_restarted(self, replica: tuple[str, Role]) -> None:
        name, role = replica
        self.incarnation += 1
        self.up[name] = self.incarnation
        lease = make_lease(name, role, self.incarnation)
        self._obey(self.core.replica_seen(replace(lease, model=N) if name == "n0" else lease, self.now_s))

    @rule(replica=st.sampled_from(REPLICAS))
    def replica_lost(self, replica: tuple[str, Role]) -> None:
        incarnation = self.up.pop(replica[0], 0)
        self._obey(self.core.replica_lost(ReplicaId(replica[0]), incarnation, self.now_s))

    @rule(
        replica=st.sampled_from(REPLICAS),
        running=st.integers(0, 4),
        stamped=st.lists(st.tuples(requests, st.integers(1, 3), st.sampled_from(StampKind)), max_size=3),
        sequence_step=st.integers(-1, 3),
    )
    def report(self, replica: tuple[str, Role], running: int, stamped: list[tuple[RequestId, int, StampKind]], sequence_step: int) -> None:
        self.sequence += sequence_step
        load = WorkerLoad(running_requests=running, kv_tokens=running * 50, pending_prefill_tokens=running * 10)
        stamps = [Stamp(request_id=request_id, attempt=attempt, kind=kind) for request_id, attempt, kind in stamped]
        self.core.report(ReplicaId(replica[0]), self.up.get(replica[0], 1), self.sequence, load, stamps)

    @rule(held=st.sampled_from(((), (N,))), refused=st.sampled_from(({}, {N: "broken"})))
    def register_told(self, held: tuple[ModelId, ...], refused: dict[ModelId, str]) -> None:
        self.core.models_held(held, refused)

    @rule(seconds=st.sampled_from((0.05, 0.6, 3.0)))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self._obey(self.core.tick(self.now_s))

    @invariant()
    def the_core_is_sound(self) -> None:
        self.core.check_invariants()
        assert self.core.running_requests == len(self.running) <= CONFIG.max_running_requests
        assert self.core.queued_requests == len(self.open) - len(self.running)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for request_id in sorted(self.open):
            self._end(request_id)
        self.core.tick(self.now_s + 2 * CONFIG.stamp_settle_s)
        self.core.check_invariants()
        assert (self.core.queued_requests, self.core.running_requests) == (0, 0)
        assert self.core._ledger.settling() == 0
        assert not self.core._requests
        assert not self.core._ended
        for lease in self.core.fleet.leases:
            assert self.core._ledger.open_bookings(lease.replica_id) == set()
            load, view = self.core._ledger.reported(lease.replica_id), self.core._ledger.view(lease.replica_id)
            assert (view.running_requests, view.kv_tokens) == (load.running_requests, load.kv_tokens)

    def _stop(self, request_id: RequestId) -> int | None:
        """The running attempt ends, whatever way."""
        attempt = self.running.pop(request_id, None)
        if attempt is not None:
            self.used_s[request_id, attempt] = self.now_s
        return attempt

    def _end(self, request_id: RequestId) -> None:
        self.open.discard(request_id)
        self._stop(request_id)
        self._obey(self.core.cancelled(request_id, self.now_s))


RouterEvents.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestRouterEvents = RouterEvents.TestCase
