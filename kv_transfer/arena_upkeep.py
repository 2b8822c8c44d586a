"""What keeps an arena sound: slots of dead writers, damage, and who holds what. Grants and evicts nothing (`arena_room.py` does).

Every change is made under the arena's lock.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.arena import Arena, SlabState, SlotState, record_sums
from kv_transfer.arena_lock import ArenaLock
from kv_transfer.copies import EXISTS, Copies, Slots
from kv_transfer.numpy_copies import cells_of
from kv_transfer.writers import Writers

MAX_LEASE_S = 60.0  # a longer one is damage
_LOCK_S = 0.05
_REPAIR_LOCK_S = 1.0


def now_ms() -> int:
    """Milliseconds of the machine's monotonic clock, modulo 2**32: the same in all its processes."""
    return time.monotonic_ns() // 1_000_000 & 0xFFFFFFFF


def is_leased(until_ms: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Whether leases that end then have not ended."""
    left_ms = (until_ms - np.uint32(now_ms())).view(np.int32)
    return (left_ms > 0) & (left_ms <= 1000 * MAX_LEASE_S)


def free_slots(arena: Arena, copies: Copies, slots: Slots) -> int:
    """Frees slots that hold a block; how many. Out of sight first, then free: readers of the old bytes see another generation."""
    copies.remove(slots)
    arena.state[slots] = SlotState.FREE
    copies.fence()
    arena.generation[slots] += np.uint32(1)
    return len(slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Slots that hold no block for readers, or one that may not go."""

    granted_slots: int
    leased_blocks: int
    leaked_slots: int  # granted to writers that are dead: until the next `reclaim`


class ArenaUpkeep:
    """What any process may do for all."""

    def __init__(self, arena: Arena, copies: Copies, lock: ArenaLock, writers: Writers) -> None:
        self._arena = arena
        self._copies = copies
        self._lock = lock
        self._writers = writers
        self._state_of_slab = arena.state.reshape(arena.geometry.num_slabs, arena.geometry.slots_per_slab)

    def repair(self) -> int:
        """Frees what dead writers held, brings index and records into agreement, drops what is damaged; how many blocks were dropped.

        O(slots), about 20 ms for 16,000 blocks, some of it under the lock: for a start, and now and then.
        """
        dropped = 0
        with self._lock.held(_REPAIR_LOCK_S) as is_held:
            if not is_held:
                return 0
            dropped += self._repair_slabs()
            self._repair_owners()
            committed = np.flatnonzero(self._arena.state == SlotState.COMMITTED).astype(np.int32)
            records = self._arena.records[committed]
            is_whole = record_sums(records) == records["sum"]
            dropped += free_slots(self._arena, self._copies, committed[~is_whole])
            dropped += self._repair_index(committed[is_whole])
        return dropped

    def reclaim(self) -> None:
        """Frees what dead writers held; cheap where there are none."""
        with self._lock.held(_LOCK_S) as is_held:
            if is_held:
                self._repair_owners()

    def census(self) -> Census:
        """Who holds what now; O(slots), about 50 us for 100,000."""
        arena = self._arena
        granted = np.flatnonzero(arena.state == SlotState.GRANTED)
        owners, counts = np.unique(arena.owner[granted], return_counts=True)
        with self._lock.held(_LOCK_S) as is_held:
            leaked = sum(
                count
                for owner, count in zip(owners.tolist(), counts.tolist(), strict=True)
                if is_held and not self._writers.is_alive(owner)
            )
        leased = (arena.state == SlotState.COMMITTED) & is_leased(arena.leased_until_ms)
        return Census(granted_slots=len(granted), leased_blocks=int(leased.sum()), leaked_slots=leaked)

    # Below: under the lock.

    def free_granted(self, number: int) -> None:
        """Frees what that writer held, who is dead."""
        arena = self._arena
        arena.state[(arena.state == SlotState.GRANTED) & (arena.owner == number)] = SlotState.FREE
        arena.slab_state[(arena.slab_state == SlabState.BACKING) & (arena.slab_owner == number)] = SlabState.ABSENT

    def _repair_slabs(self) -> int:
        """Slabs that no writer's size explains lose their slots: nothing in them can be found again."""
        arena, geometry = self._arena, self._arena.geometry
        sizes = arena.slab_slot_bytes
        is_odd = (sizes != 0) & ((sizes > geometry.slab_bytes) | (sizes < geometry.slab_bytes // geometry.slots_per_slab))
        is_odd |= (arena.slab_state > SlabState.BACKED) | ((arena.slab_state != SlabState.BACKED) & (sizes != 0))
        dropped = int((self._state_of_slab[is_odd] == SlotState.COMMITTED).sum())
        # What is not in a slot of its slab's size is no slot.
        per_slab = np.where(is_odd | (sizes == 0), 0, geometry.slab_bytes // np.maximum(sizes, 1))
        is_no_slot = np.arange(geometry.slots_per_slab)[None, :] >= per_slab[:, None]
        is_no_slot |= self._state_of_slab > SlotState.COMMITTED
        arena.generation.reshape(is_no_slot.shape)[is_no_slot & (self._state_of_slab != SlotState.FREE)] += np.uint32(1)
        self._state_of_slab[is_no_slot] = SlotState.FREE
        arena.slab_slot_bytes[is_odd] = 0
        arena.slab_state[is_odd] = SlabState.ABSENT
        return dropped

    def _repair_owners(self) -> None:
        arena = self._arena
        granted = np.flatnonzero(arena.state == SlotState.GRANTED)
        backing = np.flatnonzero(arena.slab_state == SlabState.BACKING)
        for number in np.unique(np.concatenate([arena.owner[granted], arena.slab_owner[backing]])).tolist():
            if not self._writers.is_alive(number):
                self.free_granted(number)

    def _repair_index(self, committed: Slots) -> int:
        """Cells that lead nowhere, or to another block, go; blocks that no cell leads to get one, or go where their key is held twice."""
        arena, cells = self._arena, self._arena.cells
        slots = (cells & 0xFFFFFFFF).astype(np.int64)
        is_stray = slots >= arena.geometry.num_slots
        slots[is_stray] = 0
        is_stray |= arena.state[slots] != SlotState.COMMITTED
        buckets, places = np.nonzero((cells != 0) & ~is_stray)
        marks, own = cells_of(np.ascontiguousarray(arena.records["key"][slots[buckets, places]]), len(cells))
        is_stray[buckets, places] = (cells[buckets, places] >> np.uint64(32) != marks) | (own != buckets[:, None]).all(axis=1)
        cells[is_stray & (cells != 0)] = 0
        found = self._copies.lookup(np.ascontiguousarray(arena.records["key"][committed]))
        twice = committed[(found >= 0) & (found != committed)]
        lost = committed[found < 0]
        outcomes = self._copies.index(lost)
        return free_slots(arena, self._copies, np.concatenate([twice, lost[outcomes >= EXISTS]]))
