"""Room in an arena: slots for writers, memory for slabs, eviction.

Every change is made under the arena's lock, in an order that a death at any point leaves whole: a block may be lost, never mixed up.
Copies nothing.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kv_transfer.arena import Arena, SlabState, SlotState
from kv_transfer.arena_lock import ArenaLock
from kv_transfer.arena_upkeep import ArenaUpkeep, free_slots, is_leased, now_ms
from kv_transfer.copies import Copies, Slots
from kv_transfer.retention import Retention, SlotColumns, make_retention
from kv_transfer.writers import Writers

logger = logging.getLogger(__name__)

_LOCK_S = 0.05  # a holder that is stopped costs this much a batch, outside of any engine's step
_EVICT_FRACTION = 1 / 32  # of a size's slots, at a time
_LOCKED_SLOTS = 64  # freed in one hold of the lock
_LOW_FREE_FRACTION = 1 / 16  # of a size's slots: below it room is made ahead of need
_NO_SLOTS: Slots = np.empty(0, np.int32)
_BACKING_PAUSE_S = 5.0  # after shared memory had no more to give


class ArenaRoom:
    """What one process does for room. Safe for several threads."""

    def __init__(
        self,
        arena: Arena,
        copies: Copies,
        lock: ArenaLock,
        writers: Writers,
        upkeep: ArenaUpkeep,
        policy: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arena = arena
        self._copies = copies
        self._lock = lock
        self._writers = writers
        self._upkeep = upkeep
        self._policy = policy
        self._retentions: dict[int, Retention] = {}  # by slot size
        self._recognized = np.zeros(arena.geometry.num_slots, np.uint32)  # generation of the block that was seen last in each slot
        self._clock = clock
        self._no_backing_until_s = 0.0
        self.error = ""  # why there is no more memory for blocks; empty: there is, or all of it is in use
        self.evicted_slots = 0  # by this process
        self.before_evict: Callable[[Slots], object] = lambda slots: None  # it may copy what goes
        self._state_of_slab = arena.state.reshape(arena.geometry.num_slabs, arena.geometry.slots_per_slab)

    def obtain(self, slot_bytes: int, count: int) -> Slots:
        """Up to `count` slots, granted to this process: free ones, of new slabs, of evicted blocks. May take milliseconds."""
        granted = self.claim(slot_bytes, count)
        for _ in range(count + 3):  # each round brings a slab or a batch, or ends it; others may take what one has brought
            if len(granted) >= count or not (self.back_slab() or self.evict_for(slot_bytes, count - len(granted))):
                break
            granted = np.concatenate([granted, self.claim(slot_bytes, count - len(granted))])
        return granted

    def claim(self, slot_bytes: int, count: int) -> Slots:
        """Up to `count` of the slots that are free now, granted to this process; about 20 us."""
        with self._lock.held(_LOCK_S) as is_held:
            number = self._own_number() if is_held and count > 0 else 0
            if not number:
                return _NO_SLOTS
            slots = self._slots_in(slot_bytes, SlotState.FREE)
            while len(slots) < count and self._assign_slab(slot_bytes):
                slots = self._slots_in(slot_bytes, SlotState.FREE)
            slots = slots[:count]
            # A reader of what was here before sees another generation before it sees other bytes.
            self._arena.generation[slots] += np.uint32(1)
            self._arena.owner[slots] = number
            self._copies.fence()
            self._arena.state[slots] = SlotState.GRANTED
        for slab in np.unique(slots // self._arena.geometry.slots_per_slab).tolist():
            self._arena.populate(slab)
        return slots

    def release(self, slots: Slots) -> None:
        """Gives granted slots back. Where the lock cannot be had they stay with this process until its end."""
        with self._lock.held(_LOCK_S) as is_held:
            if is_held:
                self._arena.state[slots] = SlotState.FREE

    def back_slab(self) -> bool:
        """Gives one more slab its memory; False where all have some, or shared memory is full."""
        arena = self._arena
        if self._clock() < self._no_backing_until_s:
            return False
        with self._lock.held(_LOCK_S) as is_held:
            absent = np.flatnonzero(arena.slab_state == SlabState.ABSENT)
            number = self._own_number() if is_held and len(absent) else 0
            if not number:
                return False
            slab = int(absent[0])
            arena.slab_owner[slab] = number
            arena.slab_state[slab] = SlabState.BACKING
        state = SlabState.ABSENT
        try:
            arena.back(slab)  # milliseconds, so not under the lock
            state = SlabState.BACKED
            self.error = ""
        except OSError as error:
            self._no_backing_until_s = self._clock() + _BACKING_PAUSE_S
            if not self.error:
                logger.warning("no_memory_for_blocks error=%s", error.strerror)
            self.error = f"shared memory gives no more ({error.strerror}): blocks are evicted earlier, or computed again"
        with self._lock.held(10 * _LOCK_S):  # the slab is this process's own, whether the lock was had or not
            arena.slab_slot_bytes[slab] = 0
            self._copies.fence()
            arena.slab_state[slab] = state
        return state is SlabState.BACKED

    def evict_for(self, slot_bytes: int, count: int) -> int:
        """Frees slots of that size by the policy, or a slab of another size that has been of less use; how many slots were freed."""
        used = self._used_slots(slot_bytes)
        slab = self._idle_slab(slot_bytes, used)
        if slab is not None:
            return self._take_slab(slab)
        batch = max(count, int(self._num_slots(slot_bytes) * _EVICT_FRACTION))
        victims = self._victims(slot_bytes, used, min(batch, len(used)))
        self._retention(slot_bytes).note_evicted(self._fingerprints(victims), self._arena.uses[victims].tolist())
        return self.evict(victims)

    def evict(self, slots: Slots) -> int:
        """Frees those of the slots that hold a block and are not leased; how many."""
        self.before_evict(slots)
        freed = 0
        for start in range(0, len(slots), _LOCKED_SLOTS):
            with self._lock.held(_LOCK_S) as is_held:
                if not is_held:
                    break
                freed += free_slots(self._arena, self._copies, self._committed(slots[start : start + _LOCKED_SLOTS]))
        self.evicted_slots += freed
        return freed

    def drop(self, slots: Slots, generations: npt.NDArray[np.uint32] | None = None, timeout_s: float = _LOCK_S) -> int:
        """Frees those of the slots that hold a block, leased or not, and where generations are given are still of that one."""
        with self._lock.held(timeout_s, patience_s=timeout_s) as is_held:
            if not is_held:
                return 0
            is_same = np.ones(len(slots), np.bool_) if generations is None else self._arena.generation[slots] == generations
            return free_slots(self._arena, self._copies, slots[is_same & (self._arena.state[slots] == SlotState.COMMITTED)])

    def recognize(self) -> None:
        """Gives blocks that came back after they were evicted by this process the uses that they had. For the one that keeps room."""
        arena = self._arena
        new = np.flatnonzero((arena.state == SlotState.COMMITTED) & (arena.generation != self._recognized)).astype(np.int32)
        if not len(new):
            return
        self._recognized[new] = arena.generation[new]
        sizes = arena.slab_slot_bytes[new // arena.geometry.slots_per_slab].tolist()
        for slot, slot_bytes, fingerprint in zip(new.tolist(), sizes, self._fingerprints(new), strict=True):
            uses = self._retention(slot_bytes).uses_at_insertion(fingerprint) if slot_bytes else 0
            if uses:
                arena.uses[slot] = min(0xFFFF, int(arena.uses[slot]) + uses)

    def keep(self) -> int:
        """Makes room ahead of need, for every size in use: memory while there is some, else by eviction; how many slots were freed."""
        freed = 0
        sizes = np.unique(self._arena.slab_slot_bytes[self._arena.slab_slot_bytes > 0])
        for slot_bytes in sizes.tolist():
            low = self._num_slots(slot_bytes) * _LOW_FREE_FRACTION
            free = len(self._slots_in(slot_bytes, SlotState.FREE))
            if free < low and not self._has_spare_slab() and not self.back_slab():
                freed += self.evict_for(slot_bytes, int(low) - free)
        return freed

    # Below: under the lock.

    def _own_number(self) -> int:
        """This process's number as a writer; what a dead one of that number held is free first. 0 where there is none."""
        if self._writers.has_number:
            return self._writers.number()
        number = self._writers.number()
        self._upkeep.free_granted(number)
        return number

    def _assign_slab(self, slot_bytes: int) -> bool:
        spare = np.flatnonzero((self._arena.slab_state == SlabState.BACKED) & (self._arena.slab_slot_bytes == 0))
        if len(spare):
            self._arena.slab_slot_bytes[spare[0]] = slot_bytes
        return len(spare) > 0

    def _take_slab(self, slab: int) -> int:
        """Empties a slab of another size; nothing where it is written to or leased."""
        geometry = self._arena.geometry
        slots = np.arange(slab * geometry.slots_per_slab, (slab + 1) * geometry.slots_per_slab, dtype=np.int32)
        self.before_evict(self._committed(slots))
        with self._lock.held(_LOCK_S) as is_held:
            if not is_held:
                return 0
            freed = free_slots(self._arena, self._copies, self._committed(slots))
            if (self._arena.state[slots] == SlotState.FREE).all():
                self._arena.slab_slot_bytes[slab] = 0
                freed = max(freed, 1)
            self.evicted_slots += freed
            return freed

    # Below: reads only.

    def _slots_in(self, slot_bytes: int, state: SlotState) -> Slots:
        """Slots of one size that are in that state."""
        geometry = self._arena.geometry
        slabs = np.flatnonzero((self._arena.slab_slot_bytes == slot_bytes) & (self._arena.slab_state == SlabState.BACKED))
        states = self._state_of_slab[slabs, : geometry.slab_bytes // slot_bytes]
        rows, places = np.nonzero(states == state)
        slots: Slots = (slabs[rows] * geometry.slots_per_slab + places).astype(np.int32)
        return slots

    def _num_slots(self, slot_bytes: int) -> int:
        """How many slots of one size there are."""
        geometry = self._arena.geometry
        slabs = (self._arena.slab_slot_bytes == slot_bytes) & (self._arena.slab_state == SlabState.BACKED)
        return int(slabs.sum()) * min(geometry.slots_per_slab, geometry.slab_bytes // slot_bytes)

    def _used_slots(self, slot_bytes: int) -> Slots:
        """Slots of one size whose block may go: it is not leased."""
        slots = self._slots_in(slot_bytes, SlotState.COMMITTED)
        free_to_go: Slots = slots[~is_leased(self._arena.leased_until_ms[slots])]
        return free_to_go

    def _committed(self, slots: Slots) -> Slots:
        """Those that hold a block and are not leased."""
        held: Slots = slots[(self._arena.state[slots] == SlotState.COMMITTED) & ~is_leased(self._arena.leased_until_ms[slots])]
        return held

    def _has_spare_slab(self) -> bool:
        return bool(((self._arena.slab_state == SlabState.BACKED) & (self._arena.slab_slot_bytes == 0)).any())

    def _retention(self, slot_bytes: int) -> Retention:
        found = self._retentions.get(slot_bytes)
        if found is None:
            geometry = self._arena.geometry
            found = self._retentions[slot_bytes] = make_retention(self._policy, geometry.num_slabs * (geometry.slab_bytes // slot_bytes))
        return found

    def _victims(self, slot_bytes: int, used: Slots, count: int) -> Slots:
        arena = self._arena
        columns = SlotColumns(
            last_use_ms=arena.last_use_ms[used],
            uses=arena.uses[used],
            inserted_ms=arena.inserted_ms[used],
            position=arena.records["position"][used].astype(np.uint32),
        )
        victims: Slots = used[self._retention(slot_bytes).victims(columns, now_ms(), count)]
        return victims

    def _fingerprints(self, slots: Slots) -> list[int]:
        """One number for each block: 64 bits of its hash."""
        words = np.ascontiguousarray(self._arena.records["key"][slots]).view("<u8")
        found: list[int] = (words[:, 2] ^ words[:, 0]).tolist()
        return found

    def _idle_slab(self, slot_bytes: int, used: Slots) -> int | None:
        """A slab of another size whose last use is before the median use here: it is worth more as slots of this size."""
        arena = self._arena
        is_other = (arena.slab_slot_bytes != 0) & (arena.slab_slot_bytes != slot_bytes) & (arena.slab_state == SlabState.BACKED)
        if not is_other.any():
            return None
        is_committed = self._state_of_slab == SlotState.COMMITTED
        is_held = is_committed & is_leased(arena.leased_until_ms.reshape(self._state_of_slab.shape))
        is_other &= ~is_held.any(axis=1) & ~(self._state_of_slab == SlotState.GRANTED).any(axis=1)
        if not is_other.any():
            return None
        ages_ms = (np.uint32(now_ms()) - arena.last_use_ms).reshape(self._state_of_slab.shape)
        youngest_ms = np.where(is_committed, ages_ms, np.uint32(0xFFFFFFFF)).min(axis=1)
        slab = int(np.flatnonzero(is_other)[youngest_ms[is_other].argmax()])
        own_ms = np.median(np.uint32(now_ms()) - arena.last_use_ms[used]) if len(used) else 0.0
        return slab if youngest_ms[slab] > own_ms or not len(used) else None
