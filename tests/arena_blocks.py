"""What a test does behind an arena's back: finds blocks without the index, damages and ages them, counts slots."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kv_transfer.arena import FILE_NAME, RECORD, Arena, Bytes, SlabState, SlotState
from kv_transfer.arena_store import ArenaStore
from kv_transfer.blocks import BlockKey
from tandem.domain import BlockHash, Namespace

HEADER_BYTES = 4096  # the first page; the table follows it
SLOT_COLUMNS = ("state", "owner", "uses", "generation", "last_use_ms", "inserted_ms", "leased_until_ms", "records")
SLAB_COLUMNS = ("slab_state", "slab_owner", "slab_slot_bytes")
_NAMESPACE_BYTES = 16


def kill(store: ArenaStore) -> None:
    """What the kernel does for a process that is killed: its descriptors are closed, and nothing is given back."""
    for held in (store._announcer, store._writers, store._lock, store.arena):
        held.close()


class ArenaBlocks:
    """Over the arena in `folder`, by a mapping of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.arena = Arena(self.path)

    def close(self) -> None:
        self.arena.close()

    def committed(self) -> list[int]:
        """Slots that hold a block, indexed or not."""
        return self._in_state(SlotState.COMMITTED)

    def granted(self) -> list[int]:
        return self._in_state(SlotState.GRANTED)

    def free(self) -> list[int]:
        """Free slots of slabs that have memory and a slot size."""
        return sorted(self.real_slots() & set(self._in_state(SlotState.FREE)))

    def _in_state(self, state: SlotState) -> list[int]:
        slots: list[int] = np.flatnonzero(self.arena.state == state).tolist()
        return slots

    def real_slots(self) -> set[int]:
        """All slots that there are: by slab, as many as its slot size gives."""
        geometry, slots = self.arena.geometry, set[int]()
        for slab in np.flatnonzero((self.arena.slab_state == SlabState.BACKED) & (self.arena.slab_slot_bytes > 0)).tolist():
            first = slab * geometry.slots_per_slab
            slots.update(range(first, first + min(geometry.slots_per_slab, geometry.slab_bytes // int(self.arena.slab_slot_bytes[slab]))))
        return slots

    def held(self) -> list[BlockKey]:
        """All committed blocks, in the order of their slots."""
        raw = [self.arena.key_at(slot) for slot in self.committed()]
        return [BlockKey(Namespace(one[:_NAMESPACE_BYTES].hex()), BlockHash(one[_NAMESPACE_BYTES:])) for one in raw]

    def hashes(self, namespace: Namespace) -> list[BlockHash]:
        """Of the committed blocks of a namespace."""
        return [found.block_hash for found in self.held() if found.namespace == namespace]

    def namespace(self) -> Namespace:
        """The one namespace of an arena that serves one model."""
        (namespace,) = {found.namespace for found in self.held()}
        return namespace

    def slot(self, wanted: BlockKey) -> int:
        """The one committed slot of a block."""
        (slot,) = [slot for slot, found in zip(self.committed(), self.held(), strict=True) if found == wanted]
        return slot

    def slot_bytes(self, slot: int) -> int:
        return int(self.arena.slab_slot_bytes[slot // self.arena.geometry.slots_per_slab])

    def bytes_at(self, slot: int, size_bytes: int) -> Bytes:
        """A slot's bytes in shared memory."""
        slab, in_slab = divmod(slot, self.arena.geometry.slots_per_slab)
        start = self.arena.data_offset + slab * self.arena.geometry.slab_bytes + in_slab * self.slot_bytes(slot)
        return self.arena.bytes[start : start + size_bytes]

    def payload(self, wanted: BlockKey) -> Bytes:
        """A block's bytes in shared memory."""
        slot = self.slot(wanted)
        return self.bytes_at(slot, int(self.arena.records["payload_bytes"][slot]))

    def record(self, slot: int) -> Bytes:
        """A slot's record in shared memory."""
        record: Bytes = self.arena.records.view(np.uint8).reshape(-1, RECORD.itemsize)[slot]
        return record

    def flip(self, wanted: BlockKey, position: int, bits: int = 1) -> None:
        """Damages a byte of a block's payload."""
        self.payload(wanted)[position] ^= bits

    def flip_record(self, wanted: BlockKey, position: int, bits: int = 1) -> None:
        self.record(self.slot(wanted))[position] ^= bits

    def cells(self, slot: int) -> list[int]:
        """Positions of the index cells that lead to a slot, in the index laid flat."""
        flat = self.arena.cells.reshape(-1)
        found: list[int] = np.flatnonzero((flat != 0) & ((flat & 0xFFFFFFFF) == slot)).tolist()
        return found

    def age(self, wanted: BlockKey, age_s: float) -> None:
        """Makes a block's last use that much older; across the clock's wrap, where the machine has not run for so long."""
        self.arena.last_use_ms[[self.slot(wanted)]] -= np.uint32(1000 * age_s)  # as an array: numpy warns where a scalar wraps

    def end_lease(self, wanted: BlockKey) -> None:
        self.arena.leased_until_ms[self.slot(wanted)] = 0

    def table(self) -> Bytes:
        """All that is not a block and not the header: columns, records, slabs, index."""
        return self.arena.bytes[HEADER_BYTES : self.arena.data_offset]

    def column(self, name: str) -> Bytes:
        """One column as bytes (rows, bytes of a row)."""
        column = self.arena.cells.reshape(-1) if name == "cells" else getattr(self.arena, name)
        raw: Bytes = column.view(np.uint8).reshape(len(column), column.dtype.itemsize)
        return raw

    def faults(self, is_alive: Callable[[int], bool]) -> list[str]:
        """What is wrong with the slots. Each is to be free, granted to a living writer, or committed and indexed; no key twice."""
        real, keys = self.real_slots(), self.held()
        found = [f"slot {slot} is in state {state}" for slot, state in enumerate(self.arena.state.tolist()) if state > SlotState.COMMITTED]
        found += [f"slot {slot} is used and is none" for slot in {*self.committed(), *self.granted()} - real]
        found += [f"slot {slot} is granted to a dead writer" for slot in self.granted() if not is_alive(int(self.arena.owner[slot]))]
        cells = self.arena.cells[self.arena.cells != 0] & 0xFFFFFFFF
        found += [f"slot {slot} has no cell" for slot in set(self.committed()) - set(cells.tolist())]
        found += [f"{len(keys) - len(set(keys))} keys twice"] if len(set(keys)) < len(keys) else []
        return found
