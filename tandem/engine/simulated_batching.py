"""Continuous batching of the simulated engine, by vLLM's rules: chunked prefill, priorities, preemption where KV blocks run out.

Must not know time, tokens' values or where stored blocks come from: `OuterBlocks` does.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tandem.domain import BlockHash
from tandem.engine.simulated_blocks import BlockPool
from tandem.engine.simulated_physics import StepWork


@dataclass(slots=True, eq=False, kw_only=True)
class SimulatedRun:
    """One run. `token_ids` grow by its output; `hashes` are those of its full blocks, as far as they are known."""

    run_id: str
    token_ids: list[int]
    hashes: list[BlockHash]
    priority: int = 0
    loads: bool = True  # from the store
    arrival: int = 0
    prompt_tokens: int = field(init=False)
    computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None  # of its prompt, not computed here; None before its first step
    is_waiting: bool = True

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.priority, self.arrival


class OuterBlocks(Protocol):
    """Blocks that can be had from outside."""

    def held(self, run: SimulatedRun, first: int, limit: int) -> int:
        """How many blocks of the run are held outside, from block `first` to below `limit`. A hint."""

    def load(self, run: SimulatedRun, first: int, count: int) -> int:
        """Brings them in; how many leading ones there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a step computes of one run, on top of `there_tokens`."""

    run: SimulatedRun
    tokens: int
    there_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStep:
    """One step. `loaded_blocks` came from outside during it."""

    shares: tuple[Share, ...]
    loaded_blocks: int

    @property
    def work(self) -> StepWork:
        """Its work: one token of a run that has output already is a decode request's."""
        prompts = [share for share in self.shares if not _is_decode(share)]
        decodes = [share for share in self.shares if _is_decode(share)]
        return StepWork(
            prefill_tokens=sum(share.tokens for share in prompts),
            prefill_pairs=sum(share.tokens * share.there_tokens + share.tokens**2 // 2 for share in prompts),
            decode_requests=len(decodes),
            kv_tokens=sum(share.there_tokens + 1 for share in decodes),
        )


def _is_decode(share: Share) -> bool:
    return share.tokens == 1 and share.there_tokens >= share.run.prompt_tokens


class Batching:
    """All runs of one engine. `schedule`, then `computed` once the step's time is over; `add` and `remove` at any time between."""

    def __init__(
        self, pool: BlockPool, outer: OuterBlocks, *, block_size_tokens: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._pool = pool
        self._outer = outer
        self._block_size_tokens = block_size_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._running: list[SimulatedRun] = []
        self._waiting: list[tuple[tuple[int, int], SimulatedRun]] = []  # a heap
        self._arrivals = 0

    @property
    def running_requests(self) -> int:
        """Runs that hold blocks."""
        return len(self._running)

    @property
    def waiting_requests(self) -> int:
        """Runs that do not, preempted ones among them."""
        return len(self._waiting)

    def add(self, run: SimulatedRun) -> None:
        """A new run waits for its first step."""
        self._arrivals += 1
        run.arrival = self._arrivals
        self._wait(run)

    def remove(self, run: SimulatedRun) -> None:
        """The run has ended, or nobody wants it any more; again is no harm. O(runs)."""
        if run in self._running:
            self._running.remove(run)
            self._release(run)
        elif run.is_waiting:
            self._waiting = [entry for entry in self._waiting if entry[1] is not run]
            heapq.heapify(self._waiting)
        run.is_waiting = False

    def schedule(self) -> BatchStep:
        """The next step: first who runs, then who waits, unless somebody was preempted. Without shares where nothing can be computed."""
        shares: dict[SimulatedRun, Share] = {}
        budget = self._max_num_batched_tokens
        has_preempted = False
        for run in list(self._running):
            if run.is_waiting or not budget:
                continue
            tokens = min(len(run.token_ids) - run.computed_tokens, budget)
            while (missing := self._missing(run, run.computed_tokens + tokens)) > self._pool.free_blocks:
                has_preempted = True
                victim = max(self._running, key=lambda candidate: candidate.rank)
                self._preempt(victim)
                if (undone := shares.pop(victim, None)) is not None:
                    budget += undone.tokens
                if victim is run:
                    break
            else:
                run.block_ids += self._pool.allocate(missing)
                shares[run] = Share(run=run, tokens=tokens, there_tokens=run.computed_tokens)
                budget -= tokens
        loaded_blocks = 0
        while budget and self._waiting and not has_preempted and len(self._running) < self._max_num_seqs:
            run = self._waiting[0][1]
            loaded = self._try_begin(run, budget)
            if loaded is None:
                break
            heapq.heappop(self._waiting)
            run.is_waiting = False
            self._running.append(run)
            loaded_blocks += loaded
            tokens = min(len(run.token_ids) - run.computed_tokens, budget)
            shares[run] = Share(run=run, tokens=tokens, there_tokens=run.computed_tokens)
            budget -= tokens
        return BatchStep(shares=tuple(shares.values()), loaded_blocks=loaded_blocks)

    def computed(self, step: BatchStep) -> list[SimulatedRun]:
        """The step is over: those of its runs that still go on and get a further token now."""
        ready: list[SimulatedRun] = []
        for share in step.shares:
            run = share.run
            if not run.block_ids:  # removed meanwhile
                continue
            run.computed_tokens = share.there_tokens + share.tokens
            self._name(run, share.there_tokens // self._block_size_tokens)
            if run.computed_tokens == len(run.token_ids):
                ready.append(run)
        return ready

    def check_invariants(self) -> None:
        """What must hold between any two calls; O(everything). Raises AssertionError."""
        self._pool.check_invariants()
        assert len(self._running) <= self._max_num_seqs, "more runs than may run"
        assert all(not run.block_ids for _, run in self._waiting), "a run that waits holds blocks"
        for run in self._running:
            assert len(run.block_ids) * self._block_size_tokens >= run.computed_tokens, "tokens without a block"

    def _try_begin(self, run: SimulatedRun, budget: int) -> int | None:
        """Gives a waiting run its blocks for the next step, from caches as far as there are any; None where there is no room for them.

        At least one token is left to compute. Returns the blocks that came from outside.
        """
        size, total = self._block_size_tokens, len(run.token_ids)
        limit = min(len(run.hashes), (total - 1) // size)
        local = self._pool.cached(run.hashes[:limit])
        first = len(local)
        held = self._outer.held(run, first, limit) if run.loads else 0
        there = (first + held) * size
        needed = -(-(there + min(total - there, budget)) // size) - first
        if needed + self._pool.new_holders(local) > self._pool.free_blocks:
            return None
        self._pool.hold(local)
        run.block_ids = local + self._pool.allocate(needed)
        loaded = self._outer.load(run, first, held) if held else 0
        run.computed_tokens = (first + loaded) * size
        self._name(run, first)
        if run.cached_tokens is None:
            run.cached_tokens = run.computed_tokens
        return loaded

    def _missing(self, run: SimulatedRun, total_tokens: int) -> int:
        return -(-total_tokens // self._block_size_tokens) - len(run.block_ids)

    def _name(self, run: SimulatedRun, first: int) -> None:
        """Blocks from `first` on that are full now can be found by their hashes."""
        full = min(run.computed_tokens // self._block_size_tokens, len(run.hashes))
        for block_id, block_hash in zip(run.block_ids[first:full], run.hashes[first:full], strict=True):
            self._pool.name(block_id, block_hash)

    def _preempt(self, run: SimulatedRun) -> None:
        self._running.remove(run)
        self._release(run)
        self._wait(run)

    def _wait(self, run: SimulatedRun) -> None:
        run.is_waiting = True
        heapq.heappush(self._waiting, (run.rank, run))

    def _release(self, run: SimulatedRun) -> None:
        self._pool.give_back(run.block_ids)
        run.block_ids = []
        run.computed_tokens = 0


def full_blocks(run: SimulatedRun, block_size_tokens: int) -> Sequence[BlockHash]:
    """The hashes of the run's blocks that are computed."""
    return run.hashes[: run.computed_tokens // block_size_tokens]
