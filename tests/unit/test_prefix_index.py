"""The prefix index knows who has which leading blocks, within its bound."""

import hashlib

import numpy as np

from router.prefix_index import Holder, PrefixIndex, StoreHolder
from tandem.domain import BlockHash, Namespace, ReplicaId
from tandem.short_hash import ShortHashes, short_hashes

A: Holder = (ReplicaId("a"), 1)
B: Holder = (ReplicaId("b"), 1)
STORE = StoreHolder("node", Namespace("ab" * 16))
NONE: ShortHashes = short_hashes([])


def _chain(name: str, blocks: int) -> list[BlockHash]:
    return [BlockHash(hashlib.sha256(f"{name}{index}".encode()).digest()) for index in range(blocks)]


def test_leading_blocks_are_counted_per_holder() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 4)
    index.record(chain, A)
    index.record(chain[:2], B)
    assert index.match(chain) == {A: 4, B: 2}
    assert index.match([*chain[:3], *_chain("y", 2)]) == {A: 3, B: 2}


def test_blocks_after_a_missing_one_do_not_count() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 3)
    index.record(chain[2:], A)
    assert index.match(chain) == {}
    assert index.match([]) == {}
    index.record(chain[:1], A)
    assert index.match(chain) == {A: 1}


def test_a_block_removed_amid_a_chain_ends_the_match_there() -> None:
    index = PrefixIndex(1000)
    chain = _chain("x", 300)
    index.record(chain, A)
    index.record(chain, B)
    index.apply(A, NONE, short_hashes(chain[150:151]))
    assert index.match(chain) == {A: 150, B: 300}
    index.apply(B, NONE, short_hashes(chain[100:]))
    assert index.match(chain) == {A: 150, B: 100}


def test_long_chains_of_many_holders_are_matched_in_one_walk() -> None:
    index = PrefixIndex(10_000)
    chain = _chain("x", 2048)
    holders: list[Holder] = [(ReplicaId(f"r{number}"), 1) for number in range(50)]
    for number, holder in enumerate(holders):
        index.record(chain[: 1 + 40 * number], holder)
    assert index.match(chain) == {holder: 1 + 40 * number for number, holder in enumerate(holders)}
    for holder in holders:
        index.record(chain, holder)
    assert set(index.match(chain).values()) == {2048}
    index.check_invariants()


def test_stores_are_counted_beside_replicas() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 4)
    index.record(chain[:1], A)
    index.apply(STORE, short_hashes(chain[:3]), NONE)
    match = index.match(chain)
    assert match == {A: 1}
    assert match.store_blocks("node", STORE.namespace) == 3
    assert match.store_blocks("other", STORE.namespace) == 0


def test_another_incarnation_holds_nothing() -> None:
    index = PrefixIndex(100)
    index.record(_chain("x", 2), A)
    assert (ReplicaId("a"), 2) not in index.match(_chain("x", 2))


def test_the_least_recently_used_blocks_go_first_and_a_chain_loses_its_end_first() -> None:
    index = PrefixIndex(4)
    index.record(_chain("x", 3), A)
    index.record(_chain("y", 2), A)
    assert len(index) == 4
    assert index.match(_chain("x", 3)) == {A: 2}
    index.record(_chain("x", 1), A)
    index.record(_chain("z", 2), A)
    assert index.match(_chain("x", 3)) == {A: 1}
    assert index.match(_chain("y", 2)) == {A: 1}


def test_a_chain_longer_than_the_bound_keeps_its_head() -> None:
    index = PrefixIndex(3)
    index.record(_chain("x", 10), A)
    assert len(index) == 3
    assert index.match(_chain("x", 10)) == {A: 3}
    index.check_invariants()


def test_what_a_cache_tells_twice_in_one_message_counts_once() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 2)
    index.apply(A, short_hashes([*chain, *chain]), NONE)
    assert len(index) == 2
    index.apply(A, NONE, short_hashes([chain[1], chain[1]]))
    assert index.match(chain) == {A: 1}
    index.check_invariants()


def test_a_prompt_without_a_full_block_changes_nothing() -> None:
    index = PrefixIndex(100)
    index.record([], A)
    index.correct([], A, 0)
    index.apply(A, NONE, NONE)
    assert len(index) == 0
    assert index.match(_chain("x", 1)) == {}


def test_what_nobody_holds_is_removed_in_vain() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 2)
    index.apply(A, NONE, short_hashes(chain))
    index.record(chain, A)
    index.apply(B, NONE, short_hashes(chain))
    index.apply(A, NONE, short_hashes(_chain("y", 2)))
    assert index.match(chain) == {A: 2}


def test_a_cleared_holder_holds_what_it_tells_afterwards() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 3)
    index.record(chain, A)
    index.record(chain, B)
    index.clear(A)
    assert index.match(chain) == {B: 3}
    index.clear(A)
    index.record(chain[:1], A)
    assert index.match(chain) == {A: 1, B: 3}
    index.clear(B)
    index.clear(A)
    assert len(index) == 0
    index.record(chain, B)
    assert index.match(chain) == {B: 3}
    index.check_invariants()


def test_a_dropped_holder_leaves_its_place_to_another_who_inherits_nothing() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 3)
    index.record(chain, A)
    index.drop(A)
    index.drop(A)
    assert index.match(chain) == {}
    index.record(_chain("y", 1), B)
    assert index.match(chain) == {}
    assert index.match(_chain("y", 1)) == {B: 1}


def test_a_holder_that_had_less_than_believed_is_corrected() -> None:
    index = PrefixIndex(100)
    chain = _chain("x", 4)
    index.record(chain, A)
    index.record(chain, B)
    index.correct(chain, A, 1)
    index.correct(chain, (ReplicaId("c"), 1), 1)
    assert index.match(chain) == {A: 1, B: 4}


def test_blocks_with_the_same_holders_share_one_set() -> None:
    index = PrefixIndex(1000)
    for name in "xyz":
        index.record(_chain(name, 100), A)
        index.record(_chain(name, 50), B)
    assert index.num_sets == 2
    index.clear(B)  # two equal sets under two numbers
    index.record(_chain("w", 10), A)
    index.apply(A, NONE, short_hashes(_chain("x", 100)))
    index.drop(A)
    assert index.match(_chain("z", 100)) == {}
    index.check_invariants()


def test_a_table_that_is_full_by_more_than_its_rows_stays_within_its_bound() -> None:
    index = PrefixIndex(160)
    for number in range(20):
        index.record(_chain(f"c{number}", 20), A)
    assert 120 < len(index) <= 160
    assert index.match(_chain("c19", 20)) == {A: 20}
    assert index.num_bytes == 160 * 20
    index.check_invariants()


def test_hashes_of_another_length_are_padded() -> None:
    padded = short_hashes([BlockHash(b"ab"), BlockHash(b"0123456789")])
    assert padded.tolist() == [int.from_bytes(b"ab", "little"), int.from_bytes(b"01234567", "little")]
    assert np.array_equal(short_hashes([BlockHash(bytes(range(32)))]), np.array([int.from_bytes(bytes(range(8)), "little")]))
