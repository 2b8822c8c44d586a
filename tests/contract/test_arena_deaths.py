"""Writers that are killed or stopped: what they held comes back, nothing of theirs is seen, and they stop nobody."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_transfer.arena import SlabState
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.arena_process import CAPACITY_BYTES, GRANTED, PAYLOAD_BYTES, STAGED, payload_of, running
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import ArenaBench, get, held, put

STAGED_KEYS = [key(number) for number in range(STAGED)]
COMMITTED_KEY = key(1_000)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[ArenaBench]:
    made = ArenaBench(tmp_path)
    made.open(CAPACITY_BYTES)
    yield made
    made.close()


def kill_a_writer(bench: ArenaBench) -> None:
    """It dies with granted and with staged slots, and leaves one block."""
    with running(bench.folder, "stage") as writer:
        assert len(bench.blocks.granted()) >= GRANTED
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert len(bench.blocks.granted()) >= GRANTED


class TestKilledWriters:
    def test_its_slots_come_back_and_nothing_half_done_is_seen(self, bench: ArenaBench) -> None:
        store = bench.open()
        kill_a_writer(bench)
        assert held(store, STAGED_KEYS) == [False] * STAGED
        store.upkeep.reclaim()
        assert bench.blocks.granted() == []
        assert held(store, STAGED_KEYS) == [False] * STAGED
        assert get(store, COMMITTED_KEY, PAYLOAD_BYTES) == (BlockOutcome.HIT, payload_of(0))
        assert store.stats().blocks == 1

    def test_making_room_frees_them(self, bench: ArenaBench) -> None:
        store = bench.open()
        kill_a_writer(bench)
        assert store.make_room() == 0
        assert bench.blocks.granted() == []

    def test_a_repair_frees_them(self, bench: ArenaBench) -> None:
        store = bench.open()
        kill_a_writer(bench)
        assert store.upkeep.repair() == 0
        assert bench.blocks.granted() == []

    def test_a_writer_that_takes_a_dead_ones_number_does_not_keep_its_slots(self, bench: ArenaBench) -> None:
        kill_a_writer(bench)
        store = bench.open()
        assert put(store, key(7), payload_of(7)) is PutOutcome.STORED  # the first writer since: the number is free again
        store.upkeep.reclaim()
        assert len(bench.blocks.granted()) == store.prepare(PAYLOAD_BYTES, 0)

    def test_a_slab_that_it_was_giving_memory_to_is_given_it_by_another(self, bench: ArenaBench) -> None:
        with running(bench.folder, "back"):
            pass
        assert (bench.blocks.arena.slab_state == SlabState.BACKING).sum() == 1
        store = bench.open()
        store.upkeep.reclaim()
        assert not (bench.blocks.arena.slab_state == SlabState.BACKING).any()
        blocks = [put(store, key(number), payload_of(number)) for number in range(CAPACITY_BYTES // PAYLOAD_BYTES)]
        assert set(blocks) == {PutOutcome.STORED}

    def test_many_deaths_cost_no_room(self, bench: ArenaBench) -> None:
        for _ in range(3):
            kill_a_writer(bench)
        store = bench.open()
        store.make_room()
        assert bench.blocks.granted() == []
        assert store.prepare(PAYLOAD_BYTES, 1 << 20) == CAPACITY_BYTES // PAYLOAD_BYTES


class TestLiveWriters:
    def test_one_that_lives_keeps_its_slots(self, bench: ArenaBench) -> None:
        store = bench.open()
        with running(bench.folder, "stage") as writer:
            granted = bench.blocks.granted()
            for number in (signal.SIGCONT, signal.SIGSTOP):
                os.kill(writer.pid, number)
                store.upkeep.reclaim()
                store.upkeep.repair()
                store.make_room()
                assert bench.blocks.granted() == granted

    def test_one_that_backs_a_slab_keeps_it(self, bench: ArenaBench) -> None:
        store = bench.open()
        with running(bench.folder, "back"):
            store.upkeep.reclaim()
            store.upkeep.repair()
            assert bench.blocks.arena.slab_state[0] == SlabState.BACKING


class TestStoppedHolderOfTheLock:
    def test_reads_go_on_and_puts_are_answered(self, bench: ArenaBench) -> None:
        store = bench.open()
        put(store, key(1), payload_of(1))
        staged_later = store.prepare(PAYLOAD_BYTES, 2)
        with running(bench.folder, "hold_lock") as holder:
            os.kill(holder.pid, signal.SIGSTOP)
            assert held(store, [key(1), key(2)]) == [True, False]
            assert store.contains(NAMESPACE, [block_hash(1)], lease_s=1.0) == [True]
            assert get(store, key(1), PAYLOAD_BYTES) == (BlockOutcome.HIT, payload_of(1))
            assert get(store, key(2), PAYLOAD_BYTES)[0] is BlockOutcome.MISSING
            assert store.payload_bytes(NAMESPACE, block_hash(1)) == PAYLOAD_BYTES
            assert store.stats().blocks == 1
            assert put(store, key(2), payload_of(2)) is PutOutcome.NO_ROOM
            assert store.drop(NAMESPACE, [block_hash(1)]) == 0
            assert store.make_room() == 0
            assert store.upkeep.repair() == 0
        assert put(store, key(2), payload_of(2)) is PutOutcome.STORED  # with its end the lock is free, and no slot is lost
        assert store.prepare(PAYLOAD_BYTES, 0) == staged_later - 1

    def test_damage_is_told_although_the_block_cannot_be_taken_out(self, bench: ArenaBench) -> None:
        store = bench.open()
        put(store, key(1), payload_of(1))
        bench.damage(key(1), 100)
        with running(bench.folder, "hold_lock"):
            for _ in range(2):
                assert get(store, key(1), PAYLOAD_BYTES)[0] is BlockOutcome.CORRUPT
        assert [get(store, key(1), PAYLOAD_BYTES)[0] for _ in range(2)] == [BlockOutcome.CORRUPT, BlockOutcome.MISSING]

    def test_closing_does_not_wait_for_it(self, bench: ArenaBench) -> None:
        store, other = bench.open(), bench.open()
        store.prepare(PAYLOAD_BYTES, 4)
        with running(bench.folder, "hold_lock"):
            store.close()
        assert bench.blocks.granted()
        other.make_room()  # it is known to be gone
        assert bench.blocks.granted() == []
