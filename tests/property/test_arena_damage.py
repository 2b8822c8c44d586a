"""Damage to an arena's table: never a wrong byte, never an untyped exception, and a repair that leaves every slot in order."""

import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.arena import SlotState
from kv_transfer.arena_store import ArenaStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.arena_blocks import SLAB_COLUMNS, SLOT_COLUMNS, ArenaBlocks
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import SMALL_BYTES, as_rows, get, held, put

SIZES = (1024, 5000, 320)  # of block n: SIZES[n % 3]
BLOCKS = 60
COLUMNS = (*SLOT_COLUMNS, *SLAB_COLUMNS, "cells")


@cache
def payload_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZES[number % len(SIZES)])


class Damaged:
    """Two users of one small arena that holds blocks 0 to 59, with granted slots, and the arena from behind."""

    def __init__(self, folder: Path, *, is_native: bool) -> None:
        self.stores = [ArenaStore(folder, capacity_bytes=SMALL_BYTES, native=native) for native in (is_native, True)]
        self.blocks = ArenaBlocks(folder)
        for number in range(BLOCKS):
            assert put(self.stores[0], key(number), payload_of(number)) is PutOutcome.STORED
        for store in self.stores:
            for payload_bytes in SIZES:
                store.prepare(payload_bytes, 3)

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.blocks.close()

    def use(self, first: int) -> None:
        """Reads all, puts some, leases, evicts; every byte that is got must be right."""
        for store in self.stores:
            store.stats()
            store.contains(NAMESPACE, [block_hash(number) for number in range(BLOCKS)], lease_s=0.01)
            for number in range(first, first + 5):
                put(store, key(number), payload_of(number))
            for number in range(first + 5):
                outcome, payload = get(store, key(number), len(payload_of(number)))
                assert outcome is not BlockOutcome.HIT or payload == payload_of(number)
                store.payload_bytes(NAMESPACE, block_hash(number))
            store.make_room()
            store.upkeep.reclaim()
            store.drop(NAMESPACE, [block_hash(first)])

    def is_alive(self, number: int) -> bool:
        return any(store._writers.number() == number for store in self.stores)

    def check(self, fresh: int = 5_001) -> None:
        """After a repair: every slot in order, and all that is found is right."""
        for store in self.stores:
            store.upkeep.repair()
        assert self.blocks.faults(self.is_alive) == []
        everything = [key(number) for number in range(2 * BLOCKS)]
        flags = held(self.stores[0], everything)
        assert flags == held(self.stores[1], everything)
        assert sum(flags) == len(set(self.blocks.held()) & set(everything))
        for number, is_held in enumerate(flags):
            outcome, payload = get(self.stores[number % 2], key(number), len(payload_of(number)))
            assert outcome is not BlockOutcome.HIT or (is_held and payload == payload_of(number))
        # It works on, once slots that were granted before the damage are used up.
        stored = [number for number in range(fresh, fresh + 60, 3) if put(self.stores[0], key(number), payload_of(number)) == "stored"]
        assert stored
        for number in stored[-3:]:
            assert get(self.stores[1], key(number), len(payload_of(number))) == (BlockOutcome.HIT, payload_of(number))


def flips(column: str) -> st.SearchStrategy[tuple[str, float, int, int]]:
    return st.tuples(st.just(column), st.floats(0, 1, exclude_max=True), st.integers(0, 95), st.integers(1, 255))


def flip(blocks: ArenaBlocks, column: str, where: float, byte: int, bits: int) -> None:
    """Changes a byte of one entry that is in use, or of any entry where none is."""
    raw = blocks.column(column)
    if column == "cells":
        used = np.flatnonzero(blocks.arena.cells.reshape(-1))
    elif column in SLAB_COLUMNS:
        used = np.flatnonzero(blocks.arena.slab_slot_bytes)
    else:
        used = np.flatnonzero(blocks.arena.state != SlotState.FREE)
    rows = used if len(used) and where < 0.8 else np.arange(len(raw))
    raw[rows[int(where * 997) % len(rows)], byte % raw.shape[1]] ^= bits


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "numpy"])
@settings(max_examples=120, deadline=None)
@given(damages=st.lists(st.sampled_from(COLUMNS).flatmap(flips), min_size=1, max_size=12))
def test_bytes_changed_anywhere_in_the_table_are_never_taken_for_good(is_native: bool, damages: list[tuple[str, float, int, int]]) -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    arena = Damaged(folder, is_native=is_native)
    try:
        for number, damage in enumerate(damages):
            flip(arena.blocks, *damage)
            if number % 4 == 3:
                arena.use(BLOCKS + 5 * number)
        arena.use(BLOCKS)
        arena.check()
        arena.check(6_003)
    finally:
        arena.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "numpy"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([1e-5, 1e-3, 0.1, 1.0]))
def test_a_table_of_noise_becomes_one_in_order(is_native: bool, seed: int, share: float) -> None:
    folder, rng = Path(tempfile.mkdtemp(dir="/dev/shm")), np.random.default_rng(seed)
    arena = Damaged(folder, is_native=is_native)
    try:
        table = arena.blocks.table()
        changed = rng.integers(0, len(table), max(1, int(share * len(table))))
        table[changed] = rng.integers(0, 256, len(changed), np.uint8)
        arena.use(BLOCKS)
        arena.check()
    finally:
        arena.close()
        shutil.rmtree(folder)


class TestRepair:
    @pytest.fixture(params=[True, False], ids=["native", "numpy"])
    def arena(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Damaged]:
        made = Damaged(tmp_path, is_native=request.param)
        yield made
        made.close()

    def test_an_arena_in_order_is_left_as_it_is(self, arena: Damaged) -> None:
        before = arena.blocks.table().copy()
        assert arena.stores[0].upkeep.repair() == 0
        assert np.array_equal(arena.blocks.table(), before)

    def test_a_lost_index_is_built_again_from_the_records(self, arena: Damaged) -> None:
        arena.blocks.arena.cells[:] = 0
        assert held(arena.stores[0], [key(number) for number in range(BLOCKS)]) == [False] * BLOCKS
        assert arena.stores[0].upkeep.repair() == 0
        for number in range(BLOCKS):
            assert get(arena.stores[1], key(number), len(payload_of(number))) == (BlockOutcome.HIT, payload_of(number))

    def test_a_damaged_record_costs_its_block_only(self, arena: Damaged) -> None:
        arena.blocks.flip_record(key(5), 3)
        arena.blocks.flip_record(key(6), 50)
        assert arena.stores[0].upkeep.repair() == 2
        assert held(arena.stores[0], [key(number) for number in range(BLOCKS)]) == [number not in (5, 6) for number in range(BLOCKS)]

    def test_a_block_that_is_there_twice_stays_once(self, arena: Damaged) -> None:
        old, slot = arena.blocks.slot(key(0)), arena.blocks.slot(key(3))  # of one size
        arena.blocks.record(slot)[:] = arena.blocks.record(old)
        arena.blocks.bytes_at(slot, SIZES[0])[:] = arena.blocks.bytes_at(old, SIZES[0])
        assert arena.stores[0].upkeep.repair() == 1
        assert get(arena.stores[0], key(0), SIZES[0]) == (BlockOutcome.HIT, payload_of(0))
        assert held(arena.stores[0], [key(3)]) == [False]

    def test_cells_that_lead_to_other_blocks_go(self, arena: Damaged) -> None:
        # Each costs a place in the index until then.
        slot = arena.blocks.slot(key(0))
        flat = arena.blocks.arena.cells.reshape(-1)
        stray = np.flatnonzero(flat == 0)[:50]
        flat[stray] = (0x1235 << 32) | slot
        arena.stores[0].upkeep.repair()
        assert len(arena.blocks.cells(slot)) == 1
        assert get(arena.stores[0], key(0), SIZES[0]) == (BlockOutcome.HIT, payload_of(0))

    @pytest.mark.parametrize("size_bytes", [1, 3, 255, 257, 4096, 65_535, 65_537, 0xFFFFFFFF])
    def test_a_slab_of_an_odd_slot_size_harms_nobody(self, arena: Damaged, size_bytes: int) -> None:
        arena.blocks.arena.slab_slot_bytes[1] = size_bytes
        arena.use(BLOCKS)
        arena.check()

    def test_payloads_are_not_looked_at(self, arena: Damaged) -> None:
        arena.blocks.flip(key(4), 10)
        assert arena.stores[0].upkeep.repair() == 0
        rows = as_rows(payload_of(4)).copy()
        assert arena.stores[0].get_into(NAMESPACE, [block_hash(4)], rows) == [BlockOutcome.CORRUPT]
