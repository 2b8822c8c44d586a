"""Which block is taken next, and what is still found."""

import pytest

from tandem.domain import BlockHash
from tandem.engine.simulated_blocks import BlockPool

HASHES = [BlockHash(bytes([number] * 32)) for number in range(8)]


def filled(pool: BlockPool, count: int, first: int = 0) -> list[int]:
    """Blocks of the hashes from `first` on, held."""
    block_ids = pool.allocate(count)
    for block_id, block_hash in zip(block_ids, HASHES[first:], strict=False):
        pool.name(block_id, block_hash)
    pool.check_invariants()
    return block_ids


def test_blocks_that_are_given_back_are_still_found_and_can_be_held_again() -> None:
    pool = BlockPool(4)
    block_ids = filled(pool, 2)
    pool.give_back(block_ids)
    assert (pool.free_blocks, pool.used_fraction) == (4, 0.0)
    assert pool.cached(HASHES) == block_ids
    assert pool.new_holders(block_ids) == 2
    pool.hold(block_ids)
    assert (pool.new_holders(block_ids), pool.free_blocks, pool.used_fraction) == (0, 2, 0.5)
    pool.check_invariants()


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end() -> None:
    pool = BlockPool(4)
    old, new = filled(pool, 2), filled(pool, 2, first=2)
    pool.give_back(old)
    pool.give_back(new)
    pool.allocate(1)
    assert pool.cached(HASHES[:2]) == old[:1]
    assert pool.cached(HASHES[2:4]) == new
    pool.allocate(2)
    assert pool.cached(HASHES[:2]) == []
    assert pool.cached(HASHES[2:4]) == new[:1]
    pool.check_invariants()


def test_blocks_without_a_hash_go_before_those_with_one() -> None:
    pool = BlockPool(3)
    named, unnamed = filled(pool, 1), pool.allocate(1)
    pool.give_back(named)
    pool.give_back(unnamed)
    assert pool.allocate(1) == unnamed


def test_what_two_hold_is_free_when_both_have_given_it_back() -> None:
    pool = BlockPool(2)
    block_ids = filled(pool, 1)
    pool.hold(block_ids)
    pool.give_back(block_ids)
    assert pool.free_blocks == 1
    pool.give_back(block_ids)
    assert pool.free_blocks == 2


def test_of_two_equal_blocks_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.name(first, HASHES[0])
    pool.name(second, HASHES[0])
    assert pool.cached(HASHES[:1]) == [first]
    pool.check_invariants()


def test_more_blocks_than_there_are_cannot_be_had() -> None:
    with pytest.raises(KeyError):
        BlockPool(2).allocate(3)
