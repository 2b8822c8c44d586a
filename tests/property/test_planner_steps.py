"""The transfer planner under any sequence of steps: every full block is saved once, in order, and a token is always left to compute."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kv_transfer.blocks import BlockKey
from kv_transfer.planner import KvDirective, ScheduledRequest, StepJobs, TransferPlanner
from tandem.domain import BlockHash
from tests.dict_store import NAMESPACE, DictStore, chain

BLOCK_TOKENS = 4
MAX_BLOCKS = 8
SYNC_BLOCKS = 3


@dataclass(eq=False)
class Simulated:
    """A request as an engine sees it, and what was saved of it since saves were last dropped."""

    request_id: str
    directive: KvDirective
    prompt_tokens: int
    hashes: list[BlockHash]
    block_ids: list[int]
    known_tokens: int
    computed_tokens: int | None = None  # None: it waits
    has_failed: bool = False
    saved_blocks: int = 0
    prompts_told: int = 0
    is_loading: bool = False

    def known_hashes(self) -> list[BlockHash]:
        return self.hashes[: self.known_tokens // BLOCK_TOKENS]


class PlannerMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.store = DictStore()
        self.planner = TransferPlanner(
            self.store, NAMESPACE, block_size_tokens=BLOCK_TOKENS, block_bytes=10, sync_load_bytes=10 * SYNC_BLOCKS
        )
        self.live: dict[str, Simulated] = {}
        self.expected_loads: dict[str, tuple[list[int], list[BlockHash], bool]] = {}
        self.sync_blocks = 0
        self.count = 0

    @rule(
        target=requests,
        prompt_tokens=st.integers(1, BLOCK_TOKENS * (MAX_BLOCKS - 2)),
        held_blocks=st.integers(0, MAX_BLOCKS),
        load=st.sampled_from([True, True, False]),
        publish=st.sampled_from([True, True, False]),
    )
    def add(self, prompt_tokens: int, held_blocks: int, load: bool, publish: bool) -> Simulated:
        """A request comes, and the store holds the first blocks of its chain."""
        self.count += 1
        request_id = f"r{self.count}"
        request = Simulated(
            request_id=request_id,
            directive=KvDirective(tag=f"{request_id}.d1", load=load, publish=publish),
            prompt_tokens=prompt_tokens,
            hashes=chain(MAX_BLOCKS, first_token=self.count * 1_000),
            block_ids=list(range(self.count * 100, self.count * 100 + MAX_BLOCKS)),
            known_tokens=prompt_tokens,
        )
        self.planner.track(request_id, request.directive)
        self.live[request_id] = request
        for block_hash in request.hashes[:held_blocks]:
            self.store.blocks[BlockKey(NAMESPACE, block_hash)] = b""
        return request

    @rule(request=requests, lost=st.integers(0, MAX_BLOCKS - 1))
    def store_evicts(self, request: Simulated, lost: int) -> None:
        self.store.blocks.pop(BlockKey(NAMESPACE, request.hashes[lost]), None)

    @rule(request=requests, local_blocks=st.sampled_from([0, 0, 0, 1, 2, 3]), is_admitted=st.sampled_from([True, True, False]))
    def ask(self, request: Simulated, local_blocks: int, is_admitted: bool) -> None:
        """The engine asks at a scheduling attempt, and admits the request or not."""
        if request.request_id not in self.live or request.computed_tokens is not None:
            return
        local_tokens = min(local_blocks, (request.known_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        answers = [self.planner.match(request.request_id, request.known_hashes(), request.known_tokens, local_tokens) for _ in range(2)]
        assert answers[0] == answers[1]
        external_tokens, is_async = answers[0]
        assert external_tokens % BLOCK_TOKENS == 0
        assert local_tokens + external_tokens < request.known_tokens
        assert external_tokens == 0 or (request.directive.load and not request.has_failed)
        assert not is_async or external_tokens > 0
        first, last = local_tokens // BLOCK_TOKENS, (local_tokens + external_tokens) // BLOCK_TOKENS
        assert all(self.store.contains(NAMESPACE, request.hashes[first:last]))
        if not is_admitted:
            return
        self.planner.allocate(request.request_id, request.block_ids, external_tokens)
        if external_tokens:
            self.expected_loads[request.request_id] = (request.block_ids[first:last], request.hashes[first:last], is_async)
        self.sync_blocks += 0 if is_async else last - first
        assert self.sync_blocks <= SYNC_BLOCKS
        request.computed_tokens = local_tokens + external_tokens
        request.is_loading = is_async

    @rule(chunks=st.dictionaries(st.integers(1, 20), st.integers(1, 12)), dropped=st.sets(st.integers(1, 20)))
    def step(self, chunks: dict[int, int], dropped: set[int]) -> None:
        """The engine computes a chunk of some running requests; some of the step's saves are dropped."""
        scheduled = []
        for number, tokens in chunks.items():
            request = self.live.get(f"r{number}")
            if request is None or request.computed_tokens is None or request.is_loading:
                continue
            request.computed_tokens += min(tokens, request.known_tokens - request.computed_tokens)
            scheduled.append(request)
        jobs = self.planner.plan_step(
            ScheduledRequest(
                request_id=request.request_id,
                computed_after_tokens=request.computed_tokens or 0,
                prompt_tokens=request.prompt_tokens,
                hashes=request.known_hashes(),
                block_ids=request.block_ids,
            )
            for request in scheduled
        )
        self._check_loads(jobs)
        self._check_saves(jobs, scheduled)
        self.planner.saves_dropped(f"r{number}" for number in dropped)
        for number in dropped:
            request = self.live.get(f"r{number}")
            if request is not None:
                request.saved_blocks = request.prompts_told = 0
        for request in scheduled:
            if request.computed_tokens == request.known_tokens < BLOCK_TOKENS * MAX_BLOCKS:
                request.known_tokens += 1  # the step sampled a token

    def _check_loads(self, jobs: StepJobs) -> None:
        loads = {job.request_id: (job.block_ids, job.hashes, job.is_async) for job in jobs.loads}
        assert loads == self.expected_loads
        assert len(loads) == len(jobs.loads)
        self.expected_loads = {}
        self.sync_blocks = 0

    def _check_saves(self, jobs: StepJobs, scheduled: list[Simulated]) -> None:
        saves = {job.request_id: job for job in jobs.saves}
        assert len(saves) == len(jobs.saves)
        for request in scheduled:
            job = saves.pop(request.request_id, None)
            assert request.directive.publish or job is None
            if not request.directive.publish:
                continue
            full = (request.computed_tokens or 0) // BLOCK_TOKENS
            first = request.saved_blocks
            if job is not None:
                assert job.hashes == request.hashes[first:full]
                assert job.block_ids == request.block_ids[first:full]
                assert job.tag == request.directive.tag
                assert job.first_position == first
            assert job is not None or first == full
            request.saved_blocks = max(first, full)
            if job is not None and job.prompt_hashes is not None:
                assert job.prompt_hashes == request.hashes[: request.prompt_tokens // BLOCK_TOKENS]
                request.prompts_told += 1
            assert request.prompts_told == ((request.computed_tokens or 0) >= request.prompt_tokens)
        assert saves == {}

    @rule(request=requests)
    def load_ends(self, request: Simulated) -> None:
        """A load outside the step ends; it started with the step after its admission."""
        if request.request_id not in self.expected_loads:
            request.is_loading = False

    @rule(request=requests)
    def load_fails(self, request: Simulated) -> None:
        self.planner.loads_failed([request.request_id])
        if request.request_id in self.live:
            request.has_failed = True

    @rule(request=requests)
    def preempt(self, request: Simulated) -> None:
        """The engine takes the request's blocks away; it waits again, with the tokens it has."""
        if request.request_id in self.live and request.request_id not in self.expected_loads and not request.is_loading:
            request.computed_tokens = None

    @rule(request=consumes(requests))
    def finish(self, request: Simulated) -> None:
        if request.request_id not in self.expected_loads:
            self.planner.finish(request.request_id)
            self.live.pop(request.request_id, None)

    @invariant()
    def tracks_the_live_requests_only(self) -> None:
        assert len(self.planner) == len(self.live)


TestPlannerMachine = PlannerMachine.TestCase
TestPlannerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
