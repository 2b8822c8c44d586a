"""The store's inner loops in C and in numpy: same bytes in shared memory, same checksums, whatever the layout and the processor."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copies import HIT, BlockRows, Copies
from kv_transfer.native_copies import NativeCopies, load_library
from kv_transfer.numpy_copies import NumpyCopies
from kv_transfer.store import BlockOutcome, Bytes
from tests.arena_blocks import SLAB_COLUMNS, SLOT_COLUMNS, ArenaBlocks
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import get, held

BLOCKS = 3
# Bytes of each layer's row. From 241 bytes on, and in rows of 64 bytes, the C part does it itself.
LAYERS: Sequence[tuple[int, ...]] = (
    (1,), (64,), (100, 28), (240,), (241,), (256,), (320,), (64, 64, 64, 64), (192, 128), (960,), (1024,), (1088,), (64, 960, 64),
    (1024, 1024), (2048 + 64,), (3 * 1024, 64, 5 * 1024), (16_384,), (16_384 + 64,), (65_536,), (4096,) * 16, (100_000,), (63, 1025, 8),
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArenaStore]:
    made = ArenaStore(tmp_path, capacity_bytes=8 << 20)
    yield made
    made.close()


def kinds_of(store: ArenaStore) -> dict[str, Copies]:
    """With vectors where the processor has them, plain C, numpy."""
    library = load_library()
    assert library is not None, "the native part is not compiled"
    native = {f"native-{isa}": NativeCopies(store.arena, library, checksum=True, isa=isa) for isa in (0, 1)}
    return {**native, "numpy": NumpyCopies(store.arena, checksum=True)}


def rows_of(layers: Sequence[int], *, shift_bytes: int = 0, seed: int | None = None) -> BlockRows:
    """An engine's blocks, every other one of a tensor, starting at an address that is `shift_bytes` off the lines of 64 bytes."""
    views: list[Bytes] = []
    for layer, row_bytes in enumerate(layers):
        raw = np.zeros(2 * BLOCKS * row_bytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + shift_bytes
        view = raw[start : start + 2 * BLOCKS * row_bytes].reshape(2 * BLOCKS, row_bytes)[::2]
        if seed is not None:
            view[:] = np.random.default_rng((seed, layer)).integers(0, 256, view.shape, np.uint8)
        views.append(view)
    return BlockRows(tuple(views))


def payloads_of(rows: BlockRows) -> list[bytes]:
    return [b"".join(view[block].tobytes() for view in rows.views) for block in range(BLOCKS)]


def key_bytes(number: int) -> Bytes:
    return np.frombuffer(bytes.fromhex(NAMESPACE) + block_hash(number), np.uint8)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_all_ways_give_the_same_bytes_and_the_published_checksum(store: ArenaStore, layers: tuple[int, ...]) -> None:
    rows, ids = rows_of(layers, seed=1), np.array([2, 0, 1])
    slot_bytes = store.slot_bytes(rows.payload_bytes)
    expected = [payloads_of(rows)[number] for number in ids]
    for name, copies in kinds_of(store).items():
        slots = store.room.obtain(slot_bytes, BLOCKS)
        sums = copies.gather(slots, slot_bytes, rows, ids)
        assert sums.tolist() == [xxhash.xxh3_64_intdigest(payload) for payload in expected], name
        for slot, payload in zip(slots.tolist(), expected, strict=True):
            start = store.arena.slot_start(slot, slot_bytes, rows.payload_bytes)
            assert start is not None
            assert store.arena.bytes[start : start + rows.payload_bytes].tobytes() == payload, name


@pytest.mark.parametrize("shift_bytes", [0, 1, 16, 32])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_each_way_reads_what_each_has_written(store: ArenaStore, layers: tuple[int, ...], shift_bytes: int) -> None:
    rows, ids = rows_of(layers, shift_bytes=shift_bytes, seed=2), np.arange(BLOCKS)
    slot_bytes = store.slot_bytes(rows.payload_bytes)
    kinds = kinds_of(store)
    for number, writer in enumerate(kinds.values()):
        slots = store.room.obtain(slot_bytes, BLOCKS)
        keys = np.stack([key_bytes(BLOCKS * number + index) for index in range(BLOCKS)])
        sums = writer.gather(slots, slot_bytes, rows, ids)
        assert not writer.commit(slots, keys, sums, rows.payload_bytes, 0, 0, int(store.arena.owner[slots[0]]), 0).any()
        for name, reader in kinds.items():
            into = rows_of(layers, shift_bytes=shift_bytes)
            read = reader.scatter(keys, into, np.array([1, 2, 0]), 0, only_leading=False)
            assert (read.outcomes == HIT).all(), name
            assert read.slots.tolist() == slots.tolist() == reader.lookup(keys).tolist()
            assert [payloads_of(into)[block] for block in (1, 2, 0)] == payloads_of(rows), name


def test_both_ways_leave_the_same_table(tmp_path: Path) -> None:
    tables: list[dict[str, Bytes]] = []
    for is_native in (True, False):
        store = ArenaStore(tmp_path / str(is_native), capacity_bytes=1 << 20, native=is_native)
        blocks = ArenaBlocks(tmp_path / str(is_native))
        rows = np.random.default_rng(3).integers(0, 256, (40, 1024), np.uint8)
        store.put(NAMESPACE, [block_hash(number) for number in range(40)], rows, first_position=5)
        store.drop(NAMESPACE, [block_hash(number) for number in range(0, 40, 3)])
        store.get_into(NAMESPACE, [block_hash(7)], rows[:1].copy())
        store.prepare(1024, 20)
        for column in (blocks.arena.last_use_ms, blocks.arena.inserted_ms, blocks.arena.leased_until_ms):
            column[:] = 0
        blocks.arena.cells.sort(axis=1)  # within a bucket any place is as good
        tables.append({name: blocks.column(name).copy() for name in (*SLOT_COLUMNS, *SLAB_COLUMNS, "cells")})
        tables[-1]["data"] = blocks.arena.bytes[blocks.arena.data_offset :].copy()
        store.close()
    assert [name for name in tables[0] if not np.array_equal(tables[0][name], tables[1][name])] == []


@pytest.mark.parametrize(("writes", "reads"), [(True, False), (False, True)])
def test_stores_of_both_ways_share_an_arena(tmp_path: Path, writes: bool, reads: bool) -> None:
    writer = ArenaStore(tmp_path, capacity_bytes=1 << 20, native=writes)
    reader = ArenaStore(tmp_path, capacity_bytes=1 << 20, native=reads)
    rows = np.random.default_rng(4).integers(0, 256, (400, 4096), np.uint8)  # more than there is room for
    for number, row in enumerate(rows):
        writer.put(NAMESPACE, [block_hash(number)], row[None, :])
    flags = held(reader, [key(number) for number in range(400)])
    assert 100 < sum(flags) < 400
    for number, is_held in enumerate(flags):
        outcome, payload = get(reader, key(number), 4096)
        assert outcome is (BlockOutcome.HIT if is_held else BlockOutcome.MISSING)
        assert not is_held or payload == rows[number].tobytes()
    assert reader.drop(NAMESPACE, [block_hash(399)]) == 1
    assert held(writer, [key(399)]) == [False]
    for store in (writer, reader):
        store.close()


def test_a_slot_that_is_of_another_size_by_now_is_not_written(store: ArenaStore) -> None:
    # Its slab's size was damaged: the slot would lie across others, or outside the arena.
    rows = rows_of((1024,), seed=5)
    for copies in kinds_of(store).values():
        slots = store.room.obtain(1024, BLOCKS)
        slab = int(slots[-1]) // store.arena.geometry.slots_per_slab
        before = store.arena.bytes[store.arena.data_offset :].copy()
        for odd_bytes in (0, 1, 64, 4096, 0xFFFFFFFF):
            store.arena.slab_slot_bytes[slab] = odd_bytes
            assert len(copies.gather(slots, 1024, rows, np.arange(BLOCKS))) == 0
        store.arena.slab_slot_bytes[slab] = 1024
        assert np.array_equal(store.arena.bytes[store.arena.data_offset :], before)
