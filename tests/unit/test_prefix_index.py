"""The prefix index knows who has which leading blocks, within its bound."""

from router.prefix_index import MAX_HOLDERS_PER_BLOCK, Holder, PrefixIndex
from tandem.domain import BlockHash, ReplicaId

A: Holder = (ReplicaId("a"), 1)
B: Holder = (ReplicaId("b"), 1)


def _chain(name: str, blocks: int) -> list[BlockHash]:
    return [BlockHash(f"{name}{index}".encode()) for index in range(blocks)]


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


def test_holders_of_one_block_are_bounded_newest_kept() -> None:
    index = PrefixIndex(10)
    chain = _chain("x", 1)
    holders: list[Holder] = [(ReplicaId(f"r{number}"), 1) for number in range(MAX_HOLDERS_PER_BLOCK + 1)]
    for holder in [*holders[:2], holders[0], *holders[2:]]:
        index.record(chain, holder)
    assert set(index.match(chain)) == set(holders) - {holders[1]}
