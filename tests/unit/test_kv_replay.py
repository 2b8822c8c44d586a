"""The replay of a trace through the retention policies, on small traces made here."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.bench.kv_replay import ColumnCache, hit_rates, load_trace, replay
from tandem.bench.kv_replay_peers import BlockCache, Clairvoyant, ExactLru, S3Fifo
from tandem.errors import ConfigError
from tandem.workload import TraceRow


def trace(*prompts: tuple[int, ...]) -> list[TraceRow]:
    return [TraceRow(time_s=float(index), prompt_tokens=1, output_tokens=1, block_ids=block_ids) for index, block_ids in enumerate(prompts)]


def flood(*, requests: int = 3000, seed: int = 1) -> list[TraceRow]:
    """One request in three is of twenty prompts that come back for ever; the others are never seen again."""
    rng = np.random.default_rng(seed)
    return trace(
        *(
            tuple(range(start, start + 5))
            for start in (int(rng.integers(20)) * 5 if index % 3 == 0 else 1000 + index * 5 for index in range(requests))
        )
    )


def rows_of(report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["policy"], row["capacity_blocks"]): row for row in report["rows"]}


def test_hits_are_what_is_held_when_a_request_comes_and_leading_ones_end_at_the_first_miss() -> None:
    class Holds(ExactLru):
        def __contains__(self, block: int) -> bool:
            return block in {1, 2, 4}

    assert hit_rates(trace((1, 2, 3, 4)), Holds(9)) == (0.75, 0.5)


@pytest.mark.parametrize("make", [ExactLru, S3Fifo, lambda blocks: ColumnCache("lru", blocks), lambda blocks: ColumnCache("reuse", blocks)])
def test_a_cache_that_holds_all_misses_first_uses_only(make: Any) -> None:
    assert hit_rates(trace((1, 2), (1, 3), (1, 2)), make(10)) == (0.5, 0.5)


@pytest.mark.parametrize("make", [ExactLru, S3Fifo, lambda blocks: ColumnCache("reuse", blocks)])
def test_no_cache_holds_more_than_its_capacity(make: Any) -> None:
    cache: BlockCache = make(8)
    requests = flood(requests=200)
    for index, request in enumerate(requests):
        cache.use(index, index, request.block_ids)
    assert sum(block in cache for block in {block for request in requests for block in request.block_ids}) <= 8


def test_of_one_prompt_lru_drops_the_deepest_blocks_first() -> None:
    assert hit_rates(trace((1, 2, 3), (4,), (1, 2, 3)), ExactLru(3))[1] == pytest.approx(2 / 7)
    assert hit_rates(trace((1, 2, 3), (4,), (1, 2, 3)), ColumnCache("lru", 3))[1] == pytest.approx(2 / 7)


def test_s3_fifo_keeps_what_was_used_twice_and_lets_back_in_what_it_dropped() -> None:
    cache = S3Fifo(10)
    for index, block in enumerate((1, 1, 1, *range(100, 130))):
        cache.use(index, index, (block,))
    assert 1 in cache
    assert 121 in cache
    cache.use(50, 50, (120,))  # a ghost: straight into the main queue
    for index in range(200, 208):
        cache.use(index, index, (index,))
    assert 120 in cache
    for index, block in enumerate(block for block in range(1000, 1030) for _ in range(3)):
        cache.use(300 + index, 0, (block,))
    assert 1 not in cache


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_the_best_of_all_that_can_be_done(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = trace(*(tuple({int(block) for block in rng.integers(0, 5, 2)}) for _ in range(8)))
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            there = held | set(request.block_ids)
            for kept in (frozenset(some) for count in range(3) for some in combinations(there, count)):
                after[kept] = max(after.get(kept, 0), hits + len(held & set(request.block_ids)))
        best = after
    total = sum(len(request.block_ids) for request in requests)
    assert hit_rates(requests, Clairvoyant(2, [request.block_ids for request in requests]))[0] == max(best.values()) / total


def test_a_flood_of_prompts_that_never_return_does_not_wash_out_those_that_do() -> None:
    rows = rows_of(replay(flood(), [64, 128]))
    for capacity in (64, 128):
        assert rows["reuse", capacity]["ratio_to_lru"] > 1.3
        assert rows["lru", capacity]["ratio_to_lru"] > 0.9


def test_a_report_has_a_row_for_each_policy_and_capacity() -> None:
    report: dict[str, Any] = replay(trace((1, 2), (1, 2)), [1, 4])
    assert (report["schema"], report["requests"], report["blocks"], report["distinct_blocks"]) == ("tandem.kv_replay/1", 2, 4, 2)
    kinds = {name: row["kind"] for (name, _), row in rows_of(report).items()}
    assert kinds == {"exact_lru": "peer", "s3_fifo": "peer", "clairvoyant": "bound", "lru": "ablation", "reuse": "ours"}
    assert len(report["rows"]) == 10
    assert rows_of(report)["reuse", 4]["ratio_to_lru"] == 1.0


def test_without_any_reuse_there_is_no_ratio() -> None:
    assert rows_of(replay(trace((1,), (2,)), [4], ["lru"]))["lru", 4]["ratio_to_lru"] is None


def test_wrong_settings_are_errors() -> None:
    with pytest.raises(ConfigError, match="names no blocks"):
        replay(trace(()))
    with pytest.raises(ConfigError, match="at least 1 block"):
        replay(trace((1,)), [0])
    with pytest.raises(ConfigError, match="choose one of lru, reuse"):
        replay(trace((1,)), [1], ["best"])


def test_a_trace_is_read_and_one_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with pytest.raises(ConfigError, match="--trace: cannot read"):
        load_trace(path)
    path.write_text('{"timestamp": 0, "input_length": 1024, "output_length": 16, "hash_ids": [0, 1]}\n')
    assert [row.block_ids for row in load_trace(path)] == [(0, 1)]
