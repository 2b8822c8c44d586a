"""Who is in a step: chunks, priorities, caches, preemption."""

from dataclasses import dataclass, field

from tandem.domain import BlockHash
from tandem.engine.simulated_batching import Batching, BatchStep, SimulatedRun, full_blocks
from tandem.engine.simulated_blocks import BlockPool
from tandem.engine.simulated_physics import StepWork

SIZE = 4


@dataclass
class Outside:
    """Holds `held` blocks of every run, of which `good` can be loaded."""

    held_blocks: int = 0
    good_blocks: int | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)

    def held(self, run: SimulatedRun, first: int, limit: int) -> int:
        self.asked.append((first, limit))
        return max(0, min(self.held_blocks, limit) - first)

    def load(self, run: SimulatedRun, first: int, count: int) -> int:
        return count if self.good_blocks is None else min(count, self.good_blocks)


def make_batching(num_blocks: int = 100, *, outside: Outside | None = None, seqs: int = 8, batched: int = 16) -> Batching:
    pool = BlockPool(num_blocks)
    return Batching(pool, outside or Outside(), block_size_tokens=SIZE, max_num_seqs=seqs, max_num_batched_tokens=batched)


def make_run(name: str, tokens: int, *, priority: int = 0, prompt: str = "") -> SimulatedRun:
    """Runs of one `prompt` share their blocks."""
    hashes = [BlockHash(f"{prompt or name}{block}".encode()) for block in range(tokens // SIZE)]
    return SimulatedRun(run_id=name, token_ids=list(range(tokens)), hashes=hashes, priority=priority)


def step(batching: Batching) -> dict[str, tuple[int, int]]:
    """Computes one step and gives a token to whoever gets one; tokens and those there before, by run."""
    scheduled = batching.schedule()
    for run in batching.computed(scheduled):
        run.token_ids.append(0)
    batching.check_invariants()
    return shares(scheduled)


def shares(scheduled: BatchStep) -> dict[str, tuple[int, int]]:
    return {share.run.run_id: (share.tokens, share.there_tokens) for share in scheduled.shares}


def test_a_long_prompt_is_computed_in_chunks_then_token_by_token() -> None:
    batching = make_batching(batched=10)
    batching.add(make_run("a", 24))
    assert [step(batching) for _ in range(5)] == [{"a": (10, 0)}, {"a": (10, 10)}, {"a": (4, 20)}, {"a": (1, 24)}, {"a": (1, 25)}]


def test_who_runs_comes_before_who_waits_and_both_share_the_budget() -> None:
    batching = make_batching(batched=10)
    batching.add(make_run("a", 8))
    assert step(batching) == {"a": (8, 0)}
    batching.add(make_run("b", 20))
    assert step(batching) == {"a": (1, 8), "b": (9, 0)}
    batching.add(make_run("c", 4))
    assert step(batching) == {"a": (1, 9), "b": (9, 9)}
    assert step(batching) == {"a": (1, 10), "b": (2, 18), "c": (4, 0)}


def test_a_lower_priority_value_goes_first_then_who_came_first() -> None:
    batching = make_batching(seqs=1)
    for name, priority in (("late", 5), ("second", 1), ("third", 1), ("first", 0)):
        batching.add(make_run(name, 4, priority=priority))
    order = []
    while batching.waiting_requests:
        (share,) = batching.schedule().shares
        order.append(share.run.run_id)
        batching.remove(share.run)
    assert order == ["first", "second", "third", "late"]


def test_no_more_run_at_once_than_may() -> None:
    batching = make_batching(seqs=2)
    for name in "abc":
        batching.add(make_run(name, 4))
    assert set(step(batching)) == {"a", "b"}
    assert (batching.running_requests, batching.waiting_requests) == (2, 1)


def test_a_prefix_that_is_here_is_not_computed_and_one_token_always_is() -> None:
    batching = make_batching()
    first = make_run("a", 12, prompt="p")
    batching.add(first)
    step(batching)
    batching.remove(first)
    again, longer = make_run("b", 12, prompt="p"), make_run("c", 14, prompt="p")
    batching.add(again)
    batching.add(longer)
    assert step(batching) == {"b": (4, 8), "c": (2, 12)}
    assert (again.cached_tokens, longer.cached_tokens) == (8, 12)


def test_blocks_from_outside_are_not_computed() -> None:
    outside = Outside(held_blocks=2)
    batching = make_batching(outside=outside)
    run = make_run("a", 15)
    batching.add(run)
    scheduled = batching.schedule()
    assert (shares(scheduled), scheduled.loaded_blocks, run.cached_tokens) == ({"a": (7, 8)}, 2, 8)
    assert outside.asked == [(0, 3)]


def test_blocks_that_turn_out_bad_are_computed() -> None:
    batching = make_batching(outside=Outside(held_blocks=3, good_blocks=1))
    batching.add(make_run("a", 15))
    assert step(batching) == {"a": (11, 4)}


def test_a_run_waits_while_there_are_no_blocks_for_it() -> None:
    batching = make_batching(num_blocks=3)
    first, second = make_run("a", 7), make_run("b", 8)
    batching.add(first)
    batching.add(second)
    assert step(batching) == {"a": (7, 0)}
    assert step(batching) == {"a": (1, 7)}
    batching.remove(first)
    assert step(batching) == {"b": (8, 0)}


def test_where_blocks_run_out_the_last_in_rank_starts_again() -> None:
    batching = make_batching(num_blocks=4)
    batching.add(make_run("a", 8))
    batching.add(make_run("b", 8))
    assert step(batching) == {"a": (8, 0), "b": (8, 0)}
    assert step(batching) == {"a": (1, 8)}
    assert (batching.running_requests, batching.waiting_requests) == (1, 1)
    for _ in range(3):
        assert set(step(batching)) == {"a"}  # b needs three blocks, and one is free


def test_a_run_in_the_step_already_gives_way_to_one_of_higher_rank() -> None:
    batching = make_batching(num_blocks=4)
    low, high = make_run("low", 7, priority=9), make_run("high", 8, priority=1)
    batching.add(low)
    step(batching)
    batching.add(high)
    assert step(batching) == {"low": (1, 7), "high": (8, 0)}
    assert step(batching) == {"high": (1, 8)}
    assert low.is_waiting
    assert not low.block_ids


def test_a_run_alone_that_needs_more_than_there_is_gives_way_to_nobody() -> None:
    batching = make_batching(num_blocks=2)
    run = make_run("a", 8)
    batching.add(run)
    assert step(batching) == {"a": (8, 0)}
    assert step(batching) == {}
    assert run.is_waiting


def test_a_preempted_run_goes_on_from_what_is_still_here() -> None:
    batching = make_batching(num_blocks=5)
    first, second = make_run("a", 8), make_run("b", 8)
    batching.add(first)
    batching.add(second)
    step(batching)
    step(batching)
    assert step(batching)["a"] == (1, 9)
    assert second.is_waiting
    batching.remove(first)
    assert step(batching) == {"b": (1, 8)}
    assert second.cached_tokens == 0  # of its first begin


def test_one_that_is_preempted_after_its_share_was_given_gives_it_back() -> None:
    batching = make_batching(num_blocks=5)
    low, high = make_run("low", 8, priority=5), make_run("high", 8, priority=0)
    batching.add(low)
    step(batching)
    batching.add(high)
    step(batching)
    assert step(batching) == {"high": (1, 8)}
    assert low.is_waiting
    batching.check_invariants()


def test_who_is_removed_during_its_step_gets_nothing() -> None:
    batching = make_batching()
    run, waiting = make_run("a", 8), make_run("b", 8)
    batching.add(run)
    scheduled = batching.schedule()
    batching.add(waiting)
    for _ in range(2):
        batching.remove(run)
        batching.remove(waiting)
    assert batching.computed(scheduled) == []
    assert (batching.running_requests, batching.waiting_requests) == (0, 0)
    assert batching.schedule().shares == ()
    batching.check_invariants()


def test_the_work_of_a_step_is_counted_by_kind() -> None:
    batching = make_batching(batched=20)
    batching.add(make_run("a", 8))
    step(batching)
    batching.add(make_run("b", 10))
    assert batching.schedule().work == StepWork(prefill_tokens=10, prefill_pairs=50, decode_requests=1, kv_tokens=9)


def test_blocks_are_full_when_their_tokens_are_computed() -> None:
    batching = make_batching(batched=10)
    run = make_run("a", 12)
    batching.add(run)
    step(batching)
    assert full_blocks(run, SIZE) == run.hashes[:2]
