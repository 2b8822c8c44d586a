"""What comes up from tiers below the arena and what goes down, with tiers in dictionaries."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kv_transfer import tiered_store
from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES
from kv_transfer.store import Bytes, PutOutcome
from kv_transfer.tiered_store import LowerStats, TieredStore
from tandem.domain import BlockHash, Namespace
from tests.dict_store import NAMESPACE, DictStore, block_hash, key
from tests.peer_sides import SIZE_BYTES, Side, payload_of
from tests.store_benches import as_rows

pytestmark = pytest.mark.integration

CAPACITY_BYTES = 1 << 20
SLOTS = CAPACITY_BYTES // SIZE_BYTES
OTHER = Namespace("ab" * 16)


class LowerDict(DictStore):
    """A tier in a dictionary. `error` is why it is in trouble; `put_hashes` are those of all puts, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.error = ""
        self.put_hashes: list[BlockHash] = []

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        self.put_hashes += hashes
        return super().put(namespace, hashes, rows, first_position=first_position)

    def fill(self, numbers: Sequence[int]) -> None:
        super().put(NAMESPACE, hashes_of(numbers), as_rows(*(payload_of(number) for number in numbers)))

    def damage(self, number: int) -> None:
        stored = bytearray(self.blocks[key(number)])
        stored[HEADER_BYTES + 7] ^= 1
        self.blocks[key(number)] = bytes(stored)

    def held(self, numbers: Sequence[int]) -> list[int]:
        """Those that are here; each must be whole."""
        found = [number for number in numbers if key(number) in self.blocks]
        assert all(self.blocks[key(number)][HEADER_BYTES:] == payload_of(number) for number in found)
        return found


class Clock:
    """Takes the place of module time: each put of `lower` takes a second."""

    def __init__(self, lower: LowerDict) -> None:
        self._lower = lower

    def monotonic(self) -> float:
        return float(len(self._lower.put_hashes))


def hashes_of(numbers: Sequence[int]) -> list[BlockHash]:
    return [block_hash(number) for number in numbers]


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with closing(Side(tmp_path / "store", capacity_bytes=CAPACITY_BYTES)) as side:
        yield side


@pytest.fixture
def disk() -> LowerDict:
    return LowerDict()


@pytest.fixture
def redis() -> LowerDict:
    return LowerDict()


@pytest.fixture
def tiers(side: Side, disk: LowerDict, redis: LowerDict) -> TieredStore:
    return TieredStore(side.store, {"disk": disk, "redis": redis})


def promote(tiers: TieredStore, numbers: Sequence[int]) -> int:
    return tiers.promote(NAMESPACE, hashes_of(numbers))


class TestUp:
    @pytest.mark.parametrize("blocks", [1, 32, 33, 100])
    def test_all_leading_blocks_that_are_below_come(self, side: Side, disk: LowerDict, tiers: TieredStore, blocks: int) -> None:
        disk.fill(range(blocks))
        assert promote(tiers, range(blocks + 5)) == blocks
        assert side.held(range(blocks + 5)) == list(range(blocks))
        assert tiers.promoted_blocks == {"disk": blocks, "redis": 0}

    def test_nothing_comes_after_a_gap(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        disk.fill([0, 1, 3, 4])
        assert promote(tiers, range(5)) == 2
        assert side.count(range(5)) == 2

    def test_a_gap_that_the_arena_fills_is_none(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        disk.fill([0, 1, 3, 4])
        side.put(2)
        assert promote(tiers, range(5)) == 5
        assert tiers.promoted_blocks["disk"] == 4

    def test_what_the_first_tier_lacks_comes_from_the_second(
        self, side: Side, disk: LowerDict, redis: LowerDict, tiers: TieredStore
    ) -> None:
        disk.fill([0, 1, 4])
        redis.fill([1, 2, 3, 5])
        assert promote(tiers, range(7)) == 6
        assert side.held(range(7)) == list(range(6))
        assert tiers.promoted_blocks == {"disk": 3, "redis": 3}

    def test_nothing_comes_from_a_damaged_block_on(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        disk.fill(range(5))
        disk.damage(2)
        assert promote(tiers, range(5)) == 2
        assert side.held(range(5)) == [0, 1]
        assert tiers.corrupt_blocks == {"disk": 1, "redis": 0}

    @pytest.mark.parametrize("damaged", [0, 2])
    def test_a_damaged_block_comes_from_the_next_tier(
        self, side: Side, disk: LowerDict, redis: LowerDict, tiers: TieredStore, damaged: int
    ) -> None:
        disk.fill(range(5))
        disk.damage(damaged)
        redis.fill([damaged])
        assert promote(tiers, range(5)) == 5
        assert side.held(range(5)) == list(range(5))

    def test_what_is_large_comes_in_small_batches(
        self, side: Side, disk: LowerDict, tiers: TieredStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tiered_store, "_BATCH_BYTES", SIZE_BYTES - 1)
        disk.fill(range(5))
        assert promote(tiers, range(5)) == 5

    def test_what_came_is_leased_until_it_is_loaded(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        disk.fill(range(5))
        promote(tiers, range(5))
        assert side.store.upkeep.census().leased_blocks == 5

    def test_more_than_the_arena_holds_comes_as_far_as_there_is_room(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        disk.fill(range(SLOTS + 50))
        assert promote(tiers, range(SLOTS + 50)) <= SLOTS
        assert side.store.stats().used_bytes <= CAPACITY_BYTES
        assert side.held(range(32)) == list(range(32))

    def test_without_tiers_below_only_the_arena_answers(self, side: Side) -> None:
        tiers = TieredStore(side.store, {})
        side.put(0, 1)
        assert promote(tiers, range(3)) == 2
        assert tiers.flush(1.0) == 0
        assert tiers.stats() == {}


class TestDown:
    def test_what_was_used_again_goes_down_before_it_is_evicted(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(*range(SLOTS))
        side.store.note_use(NAMESPACE, hashes_of(range(0, SLOTS, 2)))
        side.put(*range(1000, 1000 + SLOTS))  # each evicts another
        gone = [number for number in range(SLOTS) if not side.count([number])]
        assert disk.held(range(2000)) == [number for number in gone if number % 2 == 0]
        assert tiers.demoted_blocks == {"disk": len(disk.blocks), "redis": 0}
        assert disk.blocks

    def test_a_slab_that_goes_to_another_size_goes_down_first(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(*range(SLOTS))
        side.store.note_use(NAMESPACE, hashes_of(range(SLOTS)))
        for number in range(SLOTS):
            side.blocks.age(key(number), 60.0)
        side.put(5000, size_bytes=2 * SIZE_BYTES)
        assert side.count([5000]) == 1
        gone = [number for number in range(SLOTS) if not side.count([number])]
        assert gone
        assert disk.held(range(SLOTS)) == gone

    def test_what_went_down_comes_up_as_it_was(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(*range(8))
        side.store.note_use(NAMESPACE, hashes_of(range(8)))
        assert tiers.demote(np.array(side.blocks.committed(), np.int32)) == 8
        side.store.drop(NAMESPACE, hashes_of(range(8)))
        assert promote(tiers, range(8)) == 8
        assert side.held(range(8)) == list(range(8))

    def test_what_is_there_already_is_not_written_again(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(*range(8))
        disk.fill(range(4))
        side.store.note_use(NAMESPACE, hashes_of(range(8)))
        assert tiers.demote(np.array(side.blocks.committed(), np.int32)) == 4
        assert sorted(disk.put_hashes) == sorted(hashes_of(range(4, 8)))

    def test_a_tier_in_trouble_is_passed_over(self, side: Side, disk: LowerDict, redis: LowerDict, tiers: TieredStore) -> None:
        side.put(0)
        side.store.note_use(NAMESPACE, hashes_of([0]))
        slots = np.array(side.blocks.committed(), np.int32)
        disk.error = redis.error = "is on fire"
        assert tiers.demote(slots) == 0
        redis.error = ""
        assert tiers.demote(slots) == 1
        assert (disk.held([0]), redis.held([0])) == ([], [0])

    def test_a_damaged_block_goes_nowhere(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(0, 1)
        side.store.note_use(NAMESPACE, hashes_of([0, 1]))
        side.damage(0)
        assert tiers.demote(np.array(side.blocks.committed(), np.int32)) == 1
        assert disk.held([0, 1]) == [1]

    def test_a_slot_that_holds_no_block_any_more_is_left_out(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        side.put(0, 1)
        side.store.note_use(NAMESPACE, hashes_of([0, 1]))
        slots = np.array(side.blocks.committed(), np.int32)
        side.store.drop(NAMESPACE, hashes_of([0]))
        assert tiers.demote(slots) == 1

    def test_namespaces_and_sizes_are_kept_apart(self, side: Side, disk: LowerDict, tiers: TieredStore) -> None:
        cases = [(namespace, size_bytes) for namespace in (NAMESPACE, OTHER) for size_bytes in (300, SIZE_BYTES)]
        for number, (namespace, size_bytes) in enumerate(cases * 3):
            assert side.store.put(namespace, [block_hash(number)], as_rows(payload_of(number, size_bytes))) == [PutOutcome.STORED]
        assert tiers.flush(100.0) == 12
        for number, (namespace, size_bytes) in enumerate(cases * 3):
            assert disk.blocks[BlockKey(namespace, block_hash(number))][HEADER_BYTES:] == payload_of(number, size_bytes)

    def test_at_the_end_the_latest_used_go_first_as_long_as_there_is_time(
        self, side: Side, disk: LowerDict, tiers: TieredStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tiered_store, "_BATCH_BLOCKS", 4)
        monkeypatch.setattr(tiered_store, "time", Clock(disk))
        side.put(*range(40))
        for number in range(40):
            side.blocks.age(key(number), 1.0 + number * 7 % 40)  # all in another order than they were put in
        assert tiers.flush(10.0) == 12
        latest = sorted(range(40), key=lambda number: number * 7 % 40)
        assert disk.put_hashes == hashes_of(latest[:12])

    def test_what_each_tier_did_is_told(self, side: Side, disk: LowerDict, redis: LowerDict, tiers: TieredStore) -> None:
        disk.fill([0])
        promote(tiers, [0])
        redis.error = "is gone"
        assert tiers.stats() == {
            "disk": LowerStats(stats=disk.stats(), promoted_blocks=1, demoted_blocks=0, corrupt_blocks=0, error=""),
            "redis": LowerStats(stats=redis.stats(), promoted_blocks=0, demoted_blocks=0, corrupt_blocks=0, error="is gone"),
        }
