"""After any sequence of events the core has leaked nothing, dispatched nothing twice, and kept its bounds.

Workers accept late or never, reports come late, twice or not at all, callers cancel, replicas die and come back.
"""

from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from router.config import QueueOrder, RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, CopyPrefix, Dispatch, Instruction, Reject
from router.interval import PredictionKind
from router.tenants import RouterShares
from tandem.domain import (
    BlockHash,
    Lease,
    ModelId,
    Namespace,
    Receipt,
    ReplicaId,
    ReplicaState,
    RequestId,
    Role,
    Sampling,
    Slo,
    Stamp,
    StampKind,
    WorkerLoad,
)
from tandem.errors import EngineError, InvalidRequestError, ProtocolError, TandemError
from tandem.held_blocks import BlockChange
from tests.samples import ENGINE, make_lease, make_request

CONFIG = RouterConfig(max_queued_requests=4, max_running_requests=3, max_prefix_blocks=20, no_replica_wait_s=3.0, stamp_settle_s=4.0)
CONFIGS = (
    CONFIG,
    replace(CONFIG, one_worker_max_tokens=0),
    replace(CONFIG, one_worker_max_tokens=0, queue_order=QueueOrder.SHORTEST, policy="least_requests"),
)
REPLICAS = (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE), ("n0", Role.DECODE))
M = ModelId("m")
N = ModelId("n")  # a second model: of the replica n0, for the requests g and h
NODES = {"p0": "node-0", "p1": "node-1"}
BLOCKS = st.lists(st.integers(0, 9), max_size=9, unique=True).map(lambda numbers: b"".join(map(short_block, numbers)))
WEIGHTED = st.dictionaries(st.sampled_from("xyz"), st.floats(0.0, 1e6), max_size=3)
FAILURES: tuple[TandemError, ...] = (EngineError("died"), ProtocolError("gap"))


def short_block(number: int) -> bytes:
    """Of a prompt of 300 tokens."""
    return bytes([300 % 256, number]).ljust(8, b"\0")


def lease_of(name: str, role: Role, incarnation: int) -> Lease:
    """The replica's; d1 takes one request at a time, p1 is on another node."""
    engine = replace(ENGINE, max_num_seqs=1) if name == "d1" else ENGINE
    return make_lease(name, role, incarnation, model=N if name == "n0" else M, engine=engine, node=NODES.get(name, "node-0"))


class RouterEvents(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(config=st.sampled_from(CONFIGS))
    def begin(self, config: RouterConfig) -> None:
        self.core = self.make_core(config)
        self.now_s = 0.0
        self.open: set[RequestId] = set()  # submitted, and neither ended by us nor rejected
        self.running: dict[RequestId, int] = {}  # the attempt whose end we owe
        self.used_s: dict[tuple[RequestId, int], float] = {}  # attempts that ended, and when
        self.up: dict[str, int] = {}
        self.incarnation = 0
        self.sequence = 0
        self.copies: list[CopyPrefix] = []  # that the core asked for, and have not ended

    def make_core(self, config: RouterConfig) -> RouterCore:
        return RouterCore(config, Random(0))

    def _obey(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, CopyPrefix):
                assert instruction.source_node != instruction.target_node
                assert instruction.target_node not in {copy.target_node for copy in self.copies}
                self.copies.append(instruction)
                continue
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
        prompt_tokens=st.sampled_from((1, 70, 300, 5000)),
        patience_s=st.none() | st.floats(0.0, 5.0),
        n=st.sampled_from((1, 1, 2)),
        slo=st.sampled_from((Slo(), Slo(ttft_s=0.2), Slo(ttft_s=2.0))),
        flags=st.tuples(st.booleans(), st.booleans()),
        tenant=st.sampled_from("xy"),
    )
    def submit(
        self,
        name: str,
        priority: int,
        prompt_tokens: int,
        patience_s: float | None,
        n: int,
        slo: Slo,
        flags: tuple[bool, bool],
        tenant: str,
    ) -> object:
        is_sheddable, is_begun = flags
        request = make_request(
            name,
            prompt_tokens,
            Sampling(max_tokens=8, n=n),
            priority=priority,
            sheddable=is_sheddable,
            slo=slo,
            tenant=tenant,
            model=N if name in "gh" else M,
            resume_token_ids=(1, 2) if is_begun and n == 1 else (),
        )
        hashes = [BlockHash(bytes([prompt_tokens % 256, index])) for index in range(prompt_tokens // 32)]
        deadline_s = None if patience_s is None else self.now_s + patience_s
        is_running = request.request_id in self.open
        self.open.add(request.request_id)
        try:
            instructions = self.core.submit(
                request, block_hashes=hashes, deadline_s=deadline_s, now_s=self.now_s, is_begun=bool(request.resume_token_ids)
            )
            self._obey(instructions)
        except InvalidRequestError:
            assert is_running
            return multiple()
        return request.request_id

    @rule(request_id=requests, tokens=st.integers(1, 3), attempts_ago=st.sampled_from((0, 0, 0, 1)))
    def tokens(self, request_id: RequestId, tokens: int, attempts_ago: int) -> None:
        self._obey(self.core.tokens(request_id, self.running.get(request_id, 1) - attempts_ago, tokens, self.now_s))

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
        self._obey(self.core.replica_seen(replace(lease_of(name, role, self.up[name]), state=state), self.now_s))

    @rule(replica=st.sampled_from(REPLICAS))
    def replica_restarted(self, replica: tuple[str, Role]) -> None:
        name, role = replica
        self.incarnation += 1
        self.up[name] = self.incarnation
        self._obey(self.core.replica_seen(lease_of(name, role, self.incarnation), self.now_s))

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

    @rule(replica=st.sampled_from(REPLICAS), is_cleared=st.booleans(), stored=BLOCKS, removed=BLOCKS)
    def blocks_told(self, replica: tuple[str, Role], is_cleared: bool, stored: bytes, removed: bytes) -> None:
        change = BlockChange(is_cleared=is_cleared, stored=stored, removed=b"" if stored else removed)
        self.core.cached(ReplicaId(replica[0]), self.up.get(replica[0], 1), change)

    @rule(node=st.sampled_from(("node-0", "node-1")), is_cleared=st.booleans(), stored=BLOCKS, removed=BLOCKS)
    def store_told(self, node: str, is_cleared: bool, stored: bytes, removed: bytes) -> None:
        change = BlockChange(is_cleared=is_cleared, stored=stored, removed=b"" if stored else removed)
        self.core.stored(node, Namespace("ns"), change)

    @rule(node=st.sampled_from(("node-0", "node-1")))
    def store_lost(self, node: str) -> None:
        self.core.store_lost(node)

    @rule(nodes=st.sets(st.sampled_from(("node-0", "node-1", "node-2"))))
    def stores_known(self, nodes: set[str]) -> None:
        self.core.stores_known(nodes)

    @rule(seconds=st.floats(0.5, 2.0))
    def a_prefix_is_hot(self, seconds: float) -> None:
        """Its only holder has much to do, and it is asked for again and again."""
        for name, role in REPLICAS[:2]:
            self.replica_seen((name, role), ReplicaState.READY)
        self.core.stores_known({"node-0", "node-1"})
        self.core.store_lost("node-1")
        self.core.stored("node-0", Namespace("ns"), BlockChange(stored=b"".join(map(short_block, range(9)))))
        self.sequence += 1
        self.core.report(ReplicaId("p0"), self.up["p0"], self.sequence, WorkerLoad(pending_prefill_tokens=50_000), ())
        for name in "abcdef":
            if RequestId(name) not in self.open:
                self.submit(name, 0, 300, None, 1, Slo(), (False, False), "x")
                self._end(RequestId(name))
            self.now_s += seconds

    @rule(index=st.integers(0, 1), is_whole=st.booleans())
    def copy_ended(self, index: int, is_whole: bool) -> None:
        if index < len(self.copies):
            self.core.copy_ended(self.copies.pop(index), self.now_s, is_whole=is_whole)

    @rule(served=WEIGHTED, counters=WEIGHTED, waiting=st.sets(st.sampled_from("xyz")), floor=st.floats(0.0, 1e6), is_alive=st.booleans())
    def shares_heard(self, served: dict[str, float], counters: dict[str, float], waiting: set[str], floor: float, is_alive: bool) -> None:
        shares = RouterShares(served=served, counters=counters, waiting=tuple(sorted(waiting)), floor=floor)
        self.core.shares_heard({"another": shares} if is_alive else {})

    @rule()
    def predictions_are_wrong(self) -> None:
        for _ in range(60):
            self.core.predictor.scores.observe(PredictionKind.PREFILL, M, predicted=1.0, q90=1.5, actual=10.0, now_s=self.now_s)

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
        for replica_id in self.core._lines:
            lease = self.core.fleet.get(replica_id)
            assert lease is not None, "somebody waits for a replica that is gone"
            assert lease.state is ReplicaState.READY, "somebody waits for a replica that takes nothing"
        assert self.core.running_requests == len(self.running) <= CONFIG.max_running_requests
        assert self.core.queued_requests == len(self.open) - len(self.running)
        assert self.core.hot_prefixes.copying == {copy.target_node for copy in self.copies}

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
        assert not self.core._recent
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
