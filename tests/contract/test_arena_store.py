"""What only the arena can get wrong: blocks in two halves, slots of several sizes, files that are no arena."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.arena import FILE_NAME, SlabState
from kv_transfer.arena_store import ArenaStore, Staged
from kv_transfer.blocks import BlockKey
from kv_transfer.copies import BlockRows
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.domain import BlockHash
from tandem.errors import ConfigError
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import OTHER, PAYLOAD, SMALL_BYTES, A, ArenaBench, B, as_rows, get, hashes_of, held, put


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArenaBench]:
    made = ArenaBench(tmp_path, is_native=request.param)
    yield made
    made.close()


def stage(store: ArenaStore, *keys: BlockKey, payload: bytes = PAYLOAD) -> Staged:
    rows = as_rows(*[payload] * len(keys))
    return store.stage(NAMESPACE, hashes_of(keys), BlockRows((rows,)), np.arange(len(keys)))


class TestTwoHalves:
    def test_a_staged_block_is_invisible_until_it_is_committed(self, bench: ArenaBench) -> None:
        store, other = bench.open(), bench.open()
        store.prepare(len(PAYLOAD), 1)
        staged = stage(store, A)
        for user in (store, other):
            assert held(user, [A]) == [False]
            assert get(user, A)[0] is BlockOutcome.MISSING
        assert store.stats().blocks == 0
        assert store.commit(staged) == [PutOutcome.STORED]
        assert get(other, A) == (BlockOutcome.HIT, PAYLOAD)

    def test_only_as_many_are_staged_as_slots_are_granted_the_leading_ones(self, bench: ArenaBench) -> None:
        store = bench.open(SMALL_BYTES)
        granted = store.prepare(len(PAYLOAD), 3)
        keys = [key(number) for number in range(granted + 2)]
        staged = stage(store, *keys)
        assert len(staged.slots) == granted
        assert len(stage(store, A).slots) == 0
        assert store.commit(staged) == [PutOutcome.STORED] * granted
        assert held(store, keys) == [True] * granted + [False] * 2

    def test_nothing_is_staged_where_no_slot_was_granted(self, bench: ArenaBench) -> None:
        store = bench.open()
        staged = stage(store, A)
        assert len(staged.slots) == 0
        assert store.commit(staged) == []

    def test_slots_of_one_size_are_no_slots_of_another(self, bench: ArenaBench) -> None:
        store = bench.open()
        store.prepare(8192, 4)
        assert len(stage(store, A).slots) == 0

    def test_an_aborted_blocks_slot_is_used_again(self, bench: ArenaBench) -> None:
        store = bench.open(SMALL_BYTES)
        granted = store.prepare(len(PAYLOAD), 1)
        store.abort(stage(store, A))
        assert held(store, [A]) == [False]
        assert store.prepare(len(PAYLOAD), granted) == granted
        assert len(bench.blocks.granted()) == granted
        assert store.commit(stage(store, A, payload=OTHER)) == [PutOutcome.STORED]
        assert get(store, A) == (BlockOutcome.HIT, OTHER)

    def test_the_second_of_two_that_stage_a_block_finds_it_there_and_keeps_its_slot(self, bench: ArenaBench) -> None:
        first, second = bench.open(SMALL_BYTES), bench.open()
        granted = [store.prepare(len(PAYLOAD), 2) for store in (first, second)]
        ours, theirs = stage(first, A, B), stage(second, A, key(3), payload=OTHER)
        assert first.commit(ours) == [PutOutcome.STORED, PutOutcome.STORED]
        assert second.commit(theirs) == [PutOutcome.EXISTS, PutOutcome.STORED]
        assert get(first, A) == get(second, A) == (BlockOutcome.HIT, PAYLOAD)
        assert first.stats().blocks == 3
        assert second.prepare(len(PAYLOAD), 0) == granted[1] - 1
        assert len(bench.blocks.granted()) == granted[0] - 2 + granted[1] - 1

    def test_what_the_engine_does_after_stage_does_not_change_the_block(self, bench: ArenaBench) -> None:
        store = bench.open()
        store.prepare(len(PAYLOAD), 1)
        rows = as_rows(PAYLOAD).copy()
        staged = store.stage(NAMESPACE, [A.block_hash], BlockRows((rows,)), np.zeros(1, np.int64))
        rows[:] = 0
        store.commit(staged)
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)

    def test_a_blocks_place_in_its_prompt_is_recorded(self, bench: ArenaBench) -> None:
        store = bench.open()
        store.put(NAMESPACE, [block_hash(number) for number in range(3)], as_rows(*[PAYLOAD] * 3), first_position=7)
        assert [int(bench.blocks.arena.records["position"][bench.blocks.slot(key(number))]) for number in range(3)] == [7, 8, 9]

    def test_close_gives_granted_slots_back(self, bench: ArenaBench) -> None:
        store, other = bench.open(SMALL_BYTES), bench.open()
        granted = store.prepare(len(PAYLOAD), 1 << 20)
        assert put(other, A) is PutOutcome.NO_ROOM
        store.close()
        assert bench.blocks.granted() == []
        assert len(bench.blocks.free()) == granted
        assert put(other, A) is PutOutcome.STORED

    def test_a_load_stops_at_the_first_that_is_no_hit_where_told_so(self, bench: ArenaBench) -> None:
        store = bench.open()
        keys = [key(number) for number in range(4)]
        store.put(NAMESPACE, hashes_of(keys), as_rows(*[PAYLOAD] * 4))
        store.drop(NAMESPACE, [keys[1].block_hash])
        rows = np.zeros((4, len(PAYLOAD)), np.uint8)
        outcomes = store.load(NAMESPACE, hashes_of(keys), BlockRows((rows,)), np.array([3, 2, 1, 0]), only_leading=True)
        assert outcomes == [BlockOutcome.HIT] + [BlockOutcome.MISSING] * 3
        assert rows[3].tobytes() == PAYLOAD
        assert not rows[:3].any()


class TestIndex:
    def test_blocks_whose_places_in_the_index_are_taken_find_no_room(self, bench: ArenaBench) -> None:
        # Real hashes spread; these all want the same sixteen cells.
        store = bench.open(SMALL_BYTES)
        clashing = [BlockHash(bytes(16) + number.to_bytes(16, "big")) for number in range(20)]
        outcomes = store.put(NAMESPACE, clashing, as_rows(*[PAYLOAD] * 20))
        assert outcomes == [PutOutcome.STORED] * 16 + [PutOutcome.NO_ROOM] * 4
        assert store.stats().blocks == 16
        store.drop(NAMESPACE, clashing[3:4])
        assert store.put(NAMESPACE, clashing[19:], as_rows(PAYLOAD)) == [PutOutcome.STORED]

    def test_a_dropped_block_leaves_no_cell(self, bench: ArenaBench) -> None:
        store = bench.open()
        for number in range(50):
            put(store, key(number))
            store.drop(NAMESPACE, [block_hash(number)])
        assert not bench.blocks.arena.cells.any()


class TestSizes:
    def test_several_sizes_share_an_arena_and_slabs_are_of_one_size_each(self, bench: ArenaBench) -> None:
        store = bench.open(SMALL_BYTES)
        sizes = (200, 1024, 5000, 20_000, 65_536)
        for number, payload_bytes in enumerate(sizes):
            assert put(store, key(number), PAYLOAD[:8] * (payload_bytes // 8)) is PutOutcome.STORED
        slots = [bench.blocks.slot(key(number)) for number in range(len(sizes))]
        assert len({slot // bench.blocks.arena.geometry.slots_per_slab for slot in slots}) == len(sizes)
        for number, payload_bytes in enumerate(sizes):
            assert get(store, key(number), payload_bytes) == (BlockOutcome.HIT, PAYLOAD[:8] * (payload_bytes // 8))

    def test_a_slab_of_a_size_that_nobody_uses_any_more_is_taken_over(self, bench: ArenaBench) -> None:
        old, new = bench.open(SMALL_BYTES), bench.open()
        blocks = old.put(NAMESPACE, [block_hash(number) for number in range(900)], np.zeros((900, 1024), np.uint8))
        assert set(blocks) == {PutOutcome.STORED}
        for number in range(900):
            bench.set_age_s(key(number), 1_000.0)
        old.close()  # its replicas are gone
        for number in range(1_000, 1_014):
            assert put(new, key(number), bytes(65_536)) is PutOutcome.STORED
        assert new.stats().blocks >= 14
        assert (bench.blocks.arena.slab_slot_bytes == 65_536).sum() >= 14

    def test_a_slab_with_a_leased_or_a_granted_slot_is_not_taken_over(self, bench: ArenaBench) -> None:
        old, new = bench.open(SMALL_BYTES), bench.open()
        old.put(NAMESPACE, [block_hash(number) for number in range(960)], np.zeros((960, 1024), np.uint8))
        old.prepare(1024, 3)
        granted = bench.blocks.granted()
        old.contains(NAMESPACE, [A.block_hash], lease_s=60.0)
        for number in range(960):
            bench.set_age_s(key(number), 1_000.0)
        for number in range(1_000, 1_020):
            put(new, key(number), bytes(65_536))
        assert get(old, A, 1024)[0] is BlockOutcome.HIT
        assert set(granted) <= set(bench.blocks.granted())

    def test_memory_is_taken_slab_by_slab_as_it_is_needed(self, bench: ArenaBench) -> None:
        store = bench.open(SMALL_BYTES)
        assert not (bench.blocks.arena.slab_state == SlabState.BACKED).any()
        put(store, A)
        assert (bench.blocks.arena.slab_state == SlabState.BACKED).sum() == 1


class TestOpening:
    def test_the_first_one_decides_the_capacity(self, bench: ArenaBench) -> None:
        assert bench.open(SMALL_BYTES).stats().capacity_bytes == SMALL_BYTES
        assert bench.open(8 * SMALL_BYTES).stats().capacity_bytes == SMALL_BYTES

    def test_blocks_are_there_again_after_all_have_closed(self, bench: ArenaBench) -> None:
        store = bench.open()
        put(store, A)
        store.close()
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "is no arena"),
            (b"TKVARENA", "is no arena"),
            (b"something else altogether" * 1_000, "is no arena"),
        ],
        ids=["empty", "short", "foreign"],
    )
    def test_a_file_that_is_no_arena_is_replaced(
        self, bench: ArenaBench, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
    ) -> None:
        bench.folder.mkdir()
        (bench.folder / FILE_NAME).write_bytes(content)
        store = bench.open()
        assert [record.getMessage() for record in caplog.records] == [f"arena_replaced path={bench.folder / FILE_NAME} reason={reason}"]
        assert store.stats().blocks == 0
        put(store, A)
        assert get(bench.open(), A)[0] is BlockOutcome.HIT
        assert len(caplog.records) == 1

    def damaged_anew(self, bench: ArenaBench, position: int, value: bytes) -> ArenaStore:
        """An arena with a block, closed, its file changed, and opened again."""
        store = bench.open(SMALL_BYTES)
        put(store, A)
        store.close()
        with (bench.folder / FILE_NAME).open("r+b") as file:
            file.seek(position)
            file.write(value)
        return bench.open(SMALL_BYTES)

    def test_an_arena_of_another_version_is_replaced(self, bench: ArenaBench, caplog: pytest.LogCaptureFixture) -> None:
        store = self.damaged_anew(bench, 8, struct.pack("<I", 77))
        assert "is of version 77" in caplog.text
        assert store.stats().blocks == 0
        assert put(store, A) is PutOutcome.STORED

    @pytest.mark.parametrize("position", range(12, 40, 3))
    def test_an_arena_with_a_damaged_header_is_replaced(self, bench: ArenaBench, caplog: pytest.LogCaptureFixture, position: int) -> None:
        store = self.damaged_anew(bench, position, b"\x5a")
        assert "has a damaged header" in caplog.text
        assert store.stats().blocks == 0
        assert put(store, A) is PutOutcome.STORED

    @pytest.mark.parametrize("size_bytes", [100, 4096, 500_000, SMALL_BYTES])
    def test_a_truncated_arena_is_replaced(self, bench: ArenaBench, caplog: pytest.LogCaptureFixture, size_bytes: int) -> None:
        store = bench.open(SMALL_BYTES)
        put(store, A)
        store.close()
        os.truncate(bench.folder / FILE_NAME, size_bytes)
        store = bench.open(SMALL_BYTES)
        assert f"has {size_bytes} bytes" in caplog.text
        assert len(caplog.records) == 1
        assert store.stats().blocks == 0
        assert put(store, A) is PutOutcome.STORED

    @pytest.mark.parametrize("place", ["file/store", "/proc/store", "/proc"])
    def test_a_folder_that_cannot_hold_blocks_is_told_with_what_to_do(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").touch()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match="choose another --store-dir"):
            ArenaStore(tmp_path / place, capacity_bytes=SMALL_BYTES)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            store = ArenaStore(tmp_path, capacity_bytes=SMALL_BYTES)
            for number in range(5):
                put(store, key(number))
                get(store, key(number))
                get(store, key(number), 1)
                get(store, key(99))
                store.prepare(len(PAYLOAD), 3)
                store.abort(stage(store, A))
            store.make_room()
            store.upkeep.repair()
            store.close()
            store.close()
            del store  # the mapping goes with its last view
        assert os.listdir("/proc/self/fd") == before
