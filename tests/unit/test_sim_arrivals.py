"""When simulated requests come, and what an ideal cache would have of them."""

from itertools import pairwise

import pytest

from tandem.errors import ConfigError
from tandem.sim.arrivals import Arrival, arrivals_of, ideal_hit_tokens, synthetic_rows
from tandem.sim.engine_profile import H200_LLAMA_8B_FP8
from tandem.workload import TRACE_BLOCK_TOKENS, TraceRow


def rows(*prompts: int) -> list[TraceRow]:
    return [
        TraceRow(time_s=3.0 * index, prompt_tokens=tokens, output_tokens=0, block_ids=(0, 10 + index))
        for index, tokens in enumerate(prompts)
    ]


def arrivals(given: list[TraceRow], *, load: float = 0.5, seed: int = 0) -> list[Arrival]:
    return arrivals_of(given, profile=H200_LLAMA_8B_FP8, prefill_replicas=4, load=load, seed=seed)


def test_the_load_is_reached_by_scaling_time() -> None:
    found = arrivals(rows(*[4000] * 200))
    work_s = 200 * H200_LLAMA_8B_FP8.prefill_s(4000)
    assert found[-1].time_s == pytest.approx(work_s / (4 * 0.5), rel=0.02)


def test_requests_come_between_their_time_and_the_next_and_a_seed_says_when() -> None:
    found = arrivals(rows(100, 100, 100))
    assert [arrival.number for arrival in found] == [0, 1, 2]
    assert found == arrivals(rows(100, 100, 100)) != arrivals(rows(100, 100, 100), seed=1)


def test_lengths_are_at_least_one_and_blocks_are_those_of_the_prompt() -> None:
    first, second = arrivals(rows(0, 513))
    assert (first.prompt_tokens, first.output_tokens, len(first.block_hashes), first.session) == (1, 1, 1, "")
    assert (len(second.block_hashes), second.session) == (2, "11")
    assert first.block_hashes[0] == second.block_hashes[0]


def test_a_trace_of_one_moment_has_no_load() -> None:
    with pytest.raises(ConfigError, match="all have one time"):
        arrivals([TraceRow(time_s=0.0, prompt_tokens=1, output_tokens=1, block_ids=())] * 3)


def test_the_ideal_hit_is_what_earlier_requests_had_and_never_the_last_token() -> None:
    found = arrivals(
        [
            TraceRow(time_s=float(index), prompt_tokens=700, output_tokens=1, block_ids=ids)
            for index, ids in enumerate([(1, 2), (1, 2), (1, 3)])
        ]
    )
    assert ideal_hit_tokens(found) == [0, 699, 512]


def test_the_synthetic_workload_is_sessions_whose_prompts_grow_by_whole_blocks() -> None:
    found = synthetic_rows(101, seed=4)
    assert len(found) == 101
    assert found == synthetic_rows(101, seed=4) != synthetic_rows(101, seed=5)
    assert found[0].time_s == 0.0
    assert all(len(row.block_ids) == -(-row.prompt_tokens // TRACE_BLOCK_TOKENS) for row in found)
    sessions: dict[int, list[TraceRow]] = {}
    for row in found:
        if len(row.block_ids) > 1:
            sessions.setdefault(row.block_ids[1], []).append(row)
    longest = max(sessions.values(), key=len)
    for earlier, later in pairwise(longest):
        full = earlier.prompt_tokens // TRACE_BLOCK_TOKENS
        assert later.block_ids[:full] == earlier.block_ids[:full]
        assert later.prompt_tokens > earlier.prompt_tokens
