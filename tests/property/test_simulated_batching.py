"""Whatever comes and goes, the simulated engine's batching keeps within its limits and everybody gets to the end."""

from hypothesis import given
from hypothesis import strategies as st

from tandem.domain import BlockHash
from tandem.engine.simulated_batching import Batching, SimulatedRun
from tandem.engine.simulated_blocks import BlockPool

SIZE, MAX_SEQS, MAX_BATCHED, BLOCKS, MAX_TOKENS = 4, 3, 12, 12, 40


class Outside:
    """Holds the first blocks of every run, and loads of them what `valid` says."""

    def __init__(self, held: int, valid: int) -> None:
        self._held, self._valid = held, valid

    def held(self, run: SimulatedRun, first: int, limit: int) -> int:
        return max(0, min(self._held, limit) - first)

    def load(self, run: SimulatedRun, first: int, count: int) -> int:
        return min(count, self._valid)


arrivals = st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(1, 10), st.integers(0, 2))  # tokens, priority, output, prompt
events = st.lists(st.one_of(arrivals, st.integers(0, 20), st.none()), max_size=40)  # a run comes, one goes, a step


@given(events, st.integers(0, 4), st.integers(0, 4))
def test_every_run_gets_all_its_tokens_within_the_limits(
    happenings: list[tuple[int, int, int, int] | int | None], held: int, valid: int
) -> None:
    batching = Batching(
        BlockPool(BLOCKS), Outside(held, valid), block_size_tokens=SIZE, max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_BATCHED
    )
    wanted: dict[SimulatedRun, int] = {}

    def step() -> None:
        scheduled = batching.schedule()
        assert sum(share.tokens for share in scheduled.shares) <= MAX_BATCHED
        assert all(share.tokens > 0 for share in scheduled.shares)
        assert bool(scheduled.shares) == bool(wanted)
        for run in batching.computed(scheduled):
            run.token_ids.append(0)
            if len(run.token_ids) == wanted[run]:
                del wanted[run]
                batching.remove(run)
        batching.check_invariants()

    for number, happening in enumerate(happenings):
        if isinstance(happening, tuple):
            tokens, priority, output, prompt = happening
            hashes = [BlockHash(bytes([prompt, block])) for block in range(tokens // SIZE)]
            run = SimulatedRun(run_id=str(number), token_ids=[0] * tokens, hashes=hashes, priority=priority)
            wanted[run] = tokens + output
            batching.add(run)
        elif happening is None:
            step()
        elif wanted:
            run = list(wanted)[happening % len(wanted)]
            del wanted[run]
            batching.remove(run)
        batching.check_invariants()
    for _ in range(10_000):
        if not wanted:
            break
        step()
    assert not wanted
    assert (batching.running_requests, batching.waiting_requests) == (0, 0)
