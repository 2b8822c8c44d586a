"""The store's inner loops in numpy, for where native.c was not compiled, and for rows that it does not take.

Right on x86 only, whose processors keep stores in order, and loads.
"""

import numpy as np
import numpy.typing as npt
import xxhash

from kv_transfer.arena import CELLS_PER_BUCKET, KEY_BYTES, RECORD, Arena, Bytes, SlotState, record_sums
from kv_transfer.copies import CORRUPT, EXISTS, HIT, LOST, MISSING, NO_CELL, BlockIds, BlockRows, Outcomes, Read, Slots, Sums


class NumpyCopies:
    """By numpy and xxhash. Right on x86 only, whose processors keep stores in order, and loads."""

    is_native = False

    def __init__(self, arena: Arena, *, checksum: bool) -> None:
        self._arena = arena
        self._checksum = checksum

    def gather(self, slots: Slots, slot_bytes: int, rows: BlockRows, block_ids: BlockIds) -> Sums:
        """Copies block i into slot i of this process; the checksums (0 where they are off). Shorter where a slot is not of that size."""
        sums = np.zeros(len(slots), np.uint64)
        for index, (slot, block_id) in enumerate(zip(slots.tolist(), block_ids.tolist(), strict=True)):
            start = self._arena.slot_start(slot, slot_bytes, rows.payload_bytes)
            if start is None:
                return sums[:index]
            at = start
            for view in rows.views:
                self._arena.bytes[at : at + view.shape[1]] = view[block_id]
                at += view.shape[1]
            if self._checksum:
                sums[index] = xxhash.xxh3_64_intdigest(self._arena.bytes[start:at].data)
        return sums

    def scatter(self, keys: Bytes, rows: BlockRows, block_ids: BlockIds, now_ms: int, *, only_leading: bool) -> Read:
        """Copies the block of key i to block id i, checks generation and checksum after it. What is no HIT may be written in part."""
        arena, count = self._arena, len(keys)
        slots = self.lookup(keys)
        read = Read(outcomes=np.full(count, MISSING, np.uint8), slots=slots, generations=np.zeros(count, np.uint32))
        for index, slot in enumerate(slots.tolist()):
            if slot >= 0:
                read.generations[index] = arena.generation[slot]
                outcome = read.outcomes[index] = self._read_one(keys[index], slot, rows, int(block_ids[index]))
                if arena.generation[slot] != read.generations[index]:
                    outcome = read.outcomes[index] = MISSING  # it went while it was being copied
                if outcome == HIT:
                    arena.last_use_ms[slot] = now_ms
            if only_leading and read.outcomes[index] != HIT:
                slots[index + 1 :] = -1
                break
        return read

    def _read_one(self, key: Bytes, slot: int, rows: BlockRows, block_id: int) -> int:
        arena = self._arena
        record = arena.records[slot].copy()
        if arena.state[slot] != SlotState.COMMITTED or bytes(record["key"]) != bytes(key):
            return MISSING
        slot_bytes = int(arena.slab_slot_bytes[slot // arena.geometry.slots_per_slab])
        at = arena.slot_start(slot, slot_bytes, rows.payload_bytes)
        if int(record["payload_bytes"]) != rows.payload_bytes or at is None:
            # A good block of another size is a miss: the caller is wrong about it.
            return MISSING if record_sums(arena.records[slot : slot + 1].copy())[0] == record["sum"] else CORRUPT
        digest = xxhash.xxh3_64()
        for view in rows.views:
            view[block_id] = arena.bytes[at : at + view.shape[1]]
            if self._checksum:  # of what was copied, which is what will be used
                digest.update(np.ascontiguousarray(view[block_id]).data)
            at += view.shape[1]
        return HIT if not self._checksum or digest.intdigest() == int(record["checksum"]) else CORRUPT

    def lookup(self, keys: Bytes) -> Slots:
        """Committed slot of each key (n, 48), or -1."""
        arena = self._arena
        marks, buckets = cells_of(keys, arena.geometry.num_buckets)
        cells = arena.cells[buckets].reshape(len(keys), 2 * CELLS_PER_BUCKET)
        slots = (cells & 0xFFFFFFFF).astype(np.int64)
        is_like = ((cells >> np.uint64(32)) == marks[:, None]) & (slots < arena.geometry.num_slots)
        found = np.full(len(keys), -1, np.int32)
        index, cell = np.nonzero(is_like)
        likely = slots[index, cell]
        is_it = (arena.state[likely] == SlotState.COMMITTED) & (arena.records["key"][likely] == keys[index]).all(axis=1)
        found[index[is_it]] = likely[is_it]
        return found

    def commit(
        self, slots: Slots, keys: Bytes, sums: Sums, payload_bytes: int, first_position: int, tenant: int, writer: int, now_ms: int
    ) -> Outcomes:
        """Writes the records of filled slots and makes them visible."""
        arena, outcomes = self._arena, np.full(len(slots), LOST, np.uint8)
        is_own = (arena.state[slots] == SlotState.GRANTED) & (arena.owner[slots] == writer)
        records = np.zeros(len(slots), RECORD)
        records["key"], records["payload_bytes"], records["checksum"] = keys, payload_bytes, sums
        records["position"] = np.arange(first_position, first_position + len(slots))
        records["tenant"] = tenant
        records["sum"] = record_sums(records)
        slots = slots[is_own]
        arena.records[slots] = records[is_own]
        for times_ms in (arena.last_use_ms, arena.inserted_ms, arena.leased_until_ms):
            times_ms[slots] = now_ms
        arena.uses[slots] = 0
        outcomes[is_own] = self.index(slots)
        return outcomes

    def index(self, slots: Slots) -> Outcomes:
        """Enters slots with records into the index."""
        arena, outcomes = self._arena, np.zeros(len(slots), np.uint8)
        for index, slot in enumerate(slots.tolist()):
            keys = np.frombuffer(arena.key_at(slot), np.uint8)[None, :]
            marks, buckets = cells_of(keys, arena.geometry.num_buckets)
            free = arena.cells[buckets[0]] == 0
            bucket = int(free.sum(axis=1).argmax())
            if self.lookup(keys)[0] >= 0:
                outcomes[index] = EXISTS
            elif not free[bucket].any():
                outcomes[index] = NO_CELL
            else:
                arena.state[slot] = SlotState.COMMITTED
                arena.cells[buckets[0, bucket], free[bucket].argmax()] = (int(marks[0]) << 32) | slot
        return outcomes

    def remove(self, slots: Slots) -> None:
        """Takes slots out of the index by the keys in their records."""
        arena = self._arena
        keys = np.stack([np.frombuffer(arena.key_at(slot), np.uint8) for slot in slots.tolist()]) if len(slots) else _NO_KEYS
        _, buckets = cells_of(keys, arena.geometry.num_buckets)
        for slot, pair in zip(slots.tolist(), buckets.tolist(), strict=True):
            for bucket in pair:
                cells = arena.cells[bucket]
                cells[(cells != 0) & ((cells & 0xFFFFFFFF) == slot)] = 0

    def fence(self) -> None:
        """Nothing to do: this processor keeps stores in order, and numpy has stored."""


_NO_KEYS: Bytes = np.empty((0, KEY_BYTES), np.uint8)


def cells_of(keys: Bytes, num_buckets: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Mark and the two buckets of each key, as `buckets_of` in native.c."""
    words = np.ascontiguousarray(keys).view("<u8")
    word = words[:, 2] ^ words[:, 0]
    marks = (word >> np.uint64(32)) | np.uint64(1)
    buckets = np.stack([(word & 0xFFFFFFFF) % num_buckets, (words[:, 3] & 0xFFFFFFFF) % num_buckets], axis=1)
    return marks, buckets.astype(np.int64)
