"""Which blocks go first, by columns alone and by what was learned."""

import numpy as np
import pytest

from kv_transfer.retention import POLICIES, Lru, ReuseRatio, SlotColumns, make_retention
from tandem.errors import ConfigError


def columns(
    last_use_ms: list[int], uses: list[int] | None = None, position: list[int] | None = None, inserted_ms: list[int] | None = None
) -> SlotColumns:
    zeros = [0] * len(last_use_ms)
    return SlotColumns(
        last_use_ms=np.array(last_use_ms, dtype=np.uint32),
        inserted_ms=np.array(last_use_ms if inserted_ms is None else inserted_ms, dtype=np.uint32),
        uses=np.array(uses or zeros, dtype=np.uint16),
        position=np.array(position or zeros, dtype=np.uint32),
    )


def lru(held: SlotColumns, now_ms: int, count: int) -> list[int]:
    return sorted(Lru().victims(held, now_ms, count).tolist())


def thrash(policy: ReuseRatio, *, blocks: int = 200) -> None:
    """Blocks that were used once come back after their eviction, and those never used do not."""
    policy.note_evicted(range(blocks), [1] * blocks)
    policy.note_evicted(range(blocks, 3 * blocks), [0] * 2 * blocks)
    for fingerprint in range(blocks):
        assert policy.uses_at_insertion(fingerprint) == 2


def test_lru_drops_what_was_used_longest_ago() -> None:
    assert lru(columns([40, 10, 30, 20]), 50, 2) == [1, 3]


def test_ties_go_deepest_first_and_then_by_index() -> None:
    assert lru(columns([10, 10, 10, 10], position=[0, 3, 1, 2]), 50, 2) == [1, 3]
    assert lru(columns([10, 10, 10]), 50, 2) == [0, 1]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_none_or_all_can_be_asked_for(name: str) -> None:
    policy = make_retention(name, 3)
    held = columns([1, 2, 3])
    assert policy.victims(held, 5, 0).tolist() == []
    assert policy.victims(held, 5, 9).tolist() == [0, 1, 2]
    assert policy.victims(columns([]), 5, 1).tolist() == []


def test_ages_count_across_the_wrap_of_the_clock() -> None:
    before, after = 2**32 - 100, 50
    assert lru(columns([after, before]), 2**32 + 60, 1) == [1]
    assert lru(columns([after, before]), 60, 1) == [1]


def test_a_use_stamped_after_now_is_a_use_now() -> None:
    assert lru(columns([105, 90]), 100, 1) == [1]


def test_lru_remembers_nothing() -> None:
    policy = Lru()
    policy.note_evicted([7], [3])
    assert policy.uses_at_insertion(7) == 0


def test_the_reuse_policy_is_lru_while_no_reuse_comes_too_late() -> None:
    rng = np.random.default_rng(1)
    last_use_ms = rng.integers(0, 1000, 64).tolist()
    held = columns(last_use_ms, uses=rng.integers(0, 9, 64).tolist(), position=rng.integers(0, 9, 64).tolist())
    policy = ReuseRatio(64)
    policy.note_evicted([1, 2], [0, 5])
    assert policy.victims(held, 1000, 9).tolist() == Lru().victims(held, 1000, 9).tolist()
    assert policy.pressure == 0.0


def test_a_key_that_comes_back_keeps_its_count_and_is_forgotten_then() -> None:
    policy = ReuseRatio(1)
    policy.note_evicted([7], [3])
    assert policy.uses_at_insertion(7) == 4
    assert policy.uses_at_insertion(7) == 0
    assert policy.pressure > 0.0


def test_only_the_last_evicted_keys_are_remembered() -> None:
    policy = ReuseRatio(1)
    policy.note_evicted(range(9), [1] * 9)
    assert policy.uses_at_insertion(0) == 0
    assert policy.uses_at_insertion(8) == 2


def test_when_reuse_comes_too_late_the_blocks_with_better_odds_are_held() -> None:
    policy = ReuseRatio(1000)
    thrash(policy)
    held = columns([100, 900], uses=[1, 0])
    assert Lru().victims(held, 1000, 1).tolist() == [0]
    assert policy.victims(held, 1000, 1).tolist() == [1]


def test_counts_that_say_nothing_of_the_future_change_nothing() -> None:
    policy = ReuseRatio(1000)
    for uses in range(4):
        policy.note_evicted(range(200), [uses] * 200)
        for fingerprint in range(100):
            policy.uses_at_insertion(fingerprint)
    assert policy.pressure == 8.0
    assert policy.victims(columns([100, 300], uses=[3, 0]), 1000, 1).tolist() == [0]


def test_reuses_in_time_take_the_pressure_off_once_each() -> None:
    policy = ReuseRatio(1000)
    thrash(policy)
    for round_ms in (1000, 2000):
        policy.victims(columns([round_ms - 10] * 800, uses=[1] * 800, inserted_ms=[0] * 800), round_ms, 1)
    taken = policy.pressure
    assert 0.0 < taken < 0.3
    policy.victims(columns([1990] * 800, uses=[1] * 800, inserted_ms=[0] * 800), 3000, 1)
    assert policy.pressure == pytest.approx(taken)


def test_a_policy_nobody_knows_is_an_error_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no retention policy 'mru': choose one of lru, reuse"):
        make_retention("mru", 1)
