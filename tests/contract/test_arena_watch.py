"""Whoever watches an arena knows in the end what it holds, in pieces or at once, whatever happened between two looks."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kv_transfer.arena_watch import ArenaWatch
from tandem.domain import Namespace
from tandem.held_blocks import BlockChange
from tandem.short_hash import split
from tests.dict_store import NAMESPACE, block_hash
from tests.peer_sides import Side, payload_of
from tests.store_benches import as_rows

OTHER = Namespace("cd" * 16)
MANY = 1000


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with closing(Side(tmp_path / "store")) as side:
        yield side


@pytest.fixture
def watch(side: Side) -> ArenaWatch:
    return ArenaWatch(side.store.arena)


def short(*numbers: int) -> set[bytes]:
    return {block_hash(number)[:8] for number in numbers}


def named(change: BlockChange) -> tuple[set[bytes], set[bytes]]:
    return set(split(change.stored)), set(split(change.removed))


def test_what_is_held_is_told_once_and_then_what_came_and_went(side: Side, watch: ArenaWatch) -> None:
    side.put(0, 1, 2)
    changes = watch.look(MANY)
    assert {namespace: named(change) for namespace, change in changes.items()} == {NAMESPACE: (short(0, 1, 2), set())}
    assert watch.look(MANY) == {}
    side.put(3)
    side.store.drop(NAMESPACE, [block_hash(1)])
    assert named(watch.look(MANY)[NAMESPACE]) == (short(3), short(1))
    assert not watch.is_behind


def test_a_block_that_went_and_came_again_is_not_told_as_gone(side: Side, watch: ArenaWatch) -> None:
    side.put(0, 1)
    watch.look(MANY)
    side.store.drop(NAMESPACE, [block_hash(0)])
    side.put(2, 0)
    assert named(watch.look(MANY)[NAMESPACE]) == (short(0, 2), set())


def test_much_is_told_in_pieces(side: Side, watch: ArenaWatch) -> None:
    side.put(*range(25))
    known = set[bytes]()
    for _ in range(3):
        came, went = named(watch.look(10)[NAMESPACE])
        known |= came
        assert len(came) <= 10 >= len(went)
    assert known == short(*range(25))
    assert not watch.is_behind
    side.store.drop(NAMESPACE, [block_hash(number) for number in range(15)])
    side.put(30)
    seen = [named(watch.look(10)[NAMESPACE]) for _ in range(2)]
    assert watch.look(10) == {}
    assert set().union(*(went for _, went in seen)) == short(*range(15))
    assert set().union(*(came for came, _ in seen)) == short(30)


def test_namespaces_are_told_apart(side: Side, watch: ArenaWatch) -> None:
    side.put(0)
    side.store.put(OTHER, [block_hash(0), block_hash(1)], as_rows(payload_of(0), payload_of(1)))
    changes = watch.look(MANY)
    assert named(changes[NAMESPACE]) == (short(0), set())
    assert named(changes[OTHER]) == (short(0, 1), set())
    side.store.drop(OTHER, [block_hash(0)])
    assert {namespace: named(change) for namespace, change in watch.look(MANY).items()} == {OTHER: (set(), short(0))}


def test_every_listener_is_told_for_itself(side: Side, watch: ArenaWatch) -> None:
    side.put(0)
    watch.look(MANY)
    side.put(1)
    late = ArenaWatch(side.store.arena)
    assert named(late.look(MANY)[NAMESPACE])[0] == short(0, 1)
    assert named(watch.look(MANY)[NAMESPACE])[0] == short(1)


def test_an_arena_that_is_overwritten_again_and_again_is_known_in_the_end(side: Side, watch: ArenaWatch) -> None:
    known = set[bytes]()
    for start in range(0, 3000, 300):
        side.put(*range(start, start + 300))
        for change in watch.look(64).values():
            came, went = named(change)
            assert not came & went
            known = known - went | came
    while changes := watch.look(64):
        for change in changes.values():
            came, went = named(change)
            known = known - went | came
    flags = side.store.contains(NAMESPACE, [block_hash(number) for number in range(3000)])
    assert known == short(*(number for number, is_held in enumerate(flags) if is_held))
