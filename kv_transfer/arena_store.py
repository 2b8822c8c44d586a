"""The block store of a node: blocks in the arena, put and got by every process that maps it, without a message to anybody.

A put fills slots that were granted before and then makes them visible under the lock; a get copies and then checks that the slot still
held that block, whole. Whoever dies in between leaves no half block.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kv_transfer.arena import FILE_NAME, Arena, ArenaError, Bytes, SlotState
from kv_transfer.arena_lock import ArenaLock
from kv_transfer.arena_room import ArenaRoom
from kv_transfer.arena_upkeep import MAX_LEASE_S, ArenaUpkeep, now_ms
from kv_transfer.copies import COMMITTED, CORRUPT, EXISTS, HIT, MISSING, NO_CELL, BlockRows, Slots
from kv_transfer.native_copies import open_copies
from kv_transfer.published import Announcer
from kv_transfer.quotas import Quotas
from kv_transfer.retention import DEFAULT_POLICY
from kv_transfer.store import BlockOutcome, PutOutcome, StoreStats
from kv_transfer.writers import Writers
from tandem.domain import BlockHash, Namespace
from tandem.errors import ConfigError

logger = logging.getLogger(__name__)

_OPEN_S = 10.0
_COMMIT_S = 0.05
_QUARANTINE_S = 0.005  # it may be an engine's step that found the block
_KEY_BYTES = 48  # 16 of the namespace, 32 of the hash
_OUTCOMES = {HIT: BlockOutcome.HIT, MISSING: BlockOutcome.MISSING, CORRUPT: BlockOutcome.CORRUPT}
_PUT_OUTCOMES = {COMMITTED: PutOutcome.STORED, EXISTS: PutOutcome.EXISTS}
_GRANTED_AT_ONCE = 128
_NO_SLOTS: Slots = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Blocks that lie in granted slots and are not visible yet; `commit` or `abort` ends it."""

    slots: Slots
    keys: Bytes
    sums: npt.NDArray[np.uint64]
    payload_bytes: int
    slot_bytes: int
    first_position: int
    tenant: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A block as it lies in the arena: its bytes may be overwritten at any time, which its checksum shows."""

    payload: memoryview
    checksum: int


class ArenaStore:
    """The arena in `folder`, made by the first process that opens it; later ones take its size. Safe for threads.

    Raises ConfigError where the folder or shared memory cannot be used.
    """

    def __init__(
        self, folder: Path, *, capacity_bytes: int, checksum: bool = True, policy: str = DEFAULT_POLICY, native: bool = True
    ) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = ArenaLock(folder)
            self._writers = Writers(folder)
            self.arena = self._open(capacity_bytes)
        except OSError as error:
            raise ConfigError(f"cannot use {folder} for KV blocks ({error.strerror}): choose another --store-dir") from error
        self._copies = open_copies(self.arena, checksum=checksum, native=native)
        self.is_native = self._copies.is_native
        self.upkeep = ArenaUpkeep(self.arena, self._copies, self._lock, self._writers)
        self.room = ArenaRoom(self.arena, self._copies, self._lock, self._writers, self.upkeep, policy)
        self.quotas = Quotas(folder, self.arena, self.room)
        self._announcer = Announcer(folder)
        self._grants: dict[int, Slots] = {}
        self._grants_lock = threading.Lock()

    def _open(self, capacity_bytes: int) -> Arena:
        path = self._folder / FILE_NAME
        with self._lock.held(_OPEN_S) as is_held:
            if not is_held:
                raise ConfigError(f"the KV arena in {self._folder} is locked by a process that does not go on")
            try:
                return Arena(path)
            except FileNotFoundError:
                pass
            except ArenaError as error:
                logger.warning("arena_replaced path=%s reason=%s", path, error)
            Arena.create(path, capacity_bytes)
            return Arena(path)

    def slot_bytes(self, payload_bytes: int) -> int:
        """What a block of that size takes; 0 where none that large can be stored."""
        return self.arena.geometry.slot_bytes(payload_bytes)

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        """Which blocks are committed; those are not evicted for `lease_s`. About 0.1 us a block; a hint that is checked at use."""
        slots = self._copies.lookup(_keys(namespace, hashes))
        is_held = slots >= 0
        if lease_s > 0.0:
            self.arena.leased_until_ms[slots[is_held]] = _lease_end_ms(lease_s)
        flags: list[bool] = is_held.tolist()
        return flags

    def note_use(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> None:
        """A request's prefix has these blocks, wherever it takes them from: what is used is kept. Counts may be lost between writers."""
        slots = self._copies.lookup(_keys(namespace, hashes))
        held = slots[slots >= 0]
        self.arena.last_use_ms[held] = now_ms()
        self.arena.uses[held] = np.minimum(self.arena.uses[held], np.uint16(0xFFFE)) + np.uint16(1)

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        """Stores row i (n, payload_bytes) as block i; one that is there already is not written again. May evict."""
        keys = _keys(namespace, hashes)
        is_new = self._copies.lookup(keys) < 0
        wanted = np.flatnonzero(is_new)
        slots = self._obtain(self.slot_bytes(rows.shape[1]), len(wanted))
        new_keys = keys if len(wanted) == len(keys) else keys[wanted]
        stored = self.commit(self._fill(slots, new_keys, BlockRows((rows,)), wanted, first_position))
        if len(stored) == len(keys):
            return stored
        outcomes = [PutOutcome.NO_ROOM if new else PutOutcome.EXISTS for new in is_new.tolist()]
        for index, outcome in zip(wanted.tolist(), stored, strict=False):
            outcomes[index] = outcome
        return outcomes

    def prepare(self, payload_bytes: int, count: int) -> int:
        """Has `count` slots for blocks of that size granted ahead; how many there are now. May evict, and take milliseconds."""
        self.arena.populate_backed()
        slot_bytes = self.slot_bytes(payload_bytes)
        missing = count - len(self._grants.get(slot_bytes, _NO_SLOTS)) if slot_bytes else 0
        if missing > 0:
            self._give_back(slot_bytes, self.room.obtain(slot_bytes, missing))
        return len(self._grants.get(slot_bytes, _NO_SLOTS))

    def _obtain(self, slot_bytes: int, count: int) -> Slots:
        """Up to `count` slots for the caller alone; may evict, and take milliseconds."""
        slots = self._take_granted(slot_bytes, count)
        missing = count - len(slots)
        if missing > 0 and slot_bytes:
            self.arena.populate_backed()
            # A few more than asked for, so that not every put comes to the lock for slots.
            ahead = min(_GRANTED_AT_ONCE, self.arena.geometry.num_slabs * self.arena.geometry.slab_bytes // slot_bytes // 64)
            more = self.room.obtain(slot_bytes, max(missing, ahead))
            self._give_back(slot_bytes, more[missing:])
            slots = np.concatenate([slots, more[:missing]])
        return slots

    def stage(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        rows: BlockRows,
        block_ids: npt.NDArray[np.int64],
        *,
        first_position: int = 0,
        tenant: int = 0,
    ) -> Staged:
        """Copies block `block_ids[i]` into a granted slot, as far as there are some: the leading ones. Waits for nobody.

        `tenant` is whose they are, for quotas: any number of 64 bits but 0, which is nobody.
        """
        slots = self._take_granted(self.slot_bytes(rows.payload_bytes), len(hashes))
        return self._fill(slots, _keys(namespace, hashes), rows, block_ids, first_position, tenant)

    def _fill(
        self, slots: Slots, keys: Bytes, rows: BlockRows, block_ids: npt.NDArray[np.int64], first_position: int, tenant: int = 0
    ) -> Staged:
        """Copies the leading blocks, as many as there are slots."""
        slot_bytes = self.slot_bytes(rows.payload_bytes)
        sums = self._copies.gather(slots, slot_bytes, rows, block_ids[: len(slots)])
        slots = slots[: len(sums)]  # all of them, unless the table was damaged
        return Staged(
            slots=slots,
            keys=keys[: len(slots)],
            sums=sums,
            payload_bytes=rows.payload_bytes,
            slot_bytes=slot_bytes,
            first_position=first_position,
            tenant=tenant,
        )

    def commit(self, staged: Staged) -> list[PutOutcome]:
        """Makes staged blocks visible, all whole; NO_ROOM where the index has no room for one or its lock is not to be had."""
        if not len(staged.slots):
            return []
        if self._lock.acquire(_COMMIT_S):
            try:
                outcomes = self._copies.commit(
                    staged.slots,
                    staged.keys,
                    staged.sums,
                    staged.payload_bytes,
                    staged.first_position,
                    staged.tenant,
                    self._writers.number(),
                    now_ms(),
                )
            finally:
                self._lock.release()
        else:
            outcomes = np.full(len(staged.slots), NO_CELL, np.uint8)
        if outcomes.tobytes() == bytes(len(outcomes)):  # COMMITTED is 0
            return [PutOutcome.STORED] * len(outcomes)
        self._give_back(staged.slot_bytes, staged.slots[(outcomes == EXISTS) | (outcomes == NO_CELL)])
        return [_PUT_OUTCOMES.get(outcome, PutOutcome.NO_ROOM) for outcome in outcomes.tolist()]

    def announce(self) -> None:
        """Tells this node's store service that blocks became visible; never waits."""
        self._announcer.announce()

    def open_slots(
        self, namespace: Namespace, hashes: Sequence[BlockHash], payload_bytes: int, *, first_position: int = 0
    ) -> tuple[Staged, list[memoryview]]:
        """Granted slots for the leading blocks, as far as there are some, to be filled by the caller; may evict.

        The caller sets `sums` and ends it by `commit_some`.
        """
        slot_bytes = self.slot_bytes(payload_bytes)
        slots = self._obtain(slot_bytes, len(hashes))
        views = self.arena.slot_views(slots, slot_bytes, payload_bytes)
        staged = Staged(
            slots=slots[: len(views)],
            keys=_keys(namespace, hashes[: len(views)]),
            sums=np.zeros(len(views), np.uint64),
            payload_bytes=payload_bytes,
            slot_bytes=slot_bytes,
            first_position=first_position,
        )
        return staged, views

    def commit_some(self, staged: Staged, indices: Sequence[int]) -> list[PutOutcome]:
        """Makes these of the staged blocks visible; the other slots stay granted for others."""
        chosen = np.array(indices, np.int64)
        others = np.setdiff1d(np.arange(len(staged.slots)), chosen)
        self._give_back(staged.slot_bytes, staged.slots[others])
        return self.commit(replace(staged, slots=staged.slots[chosen], keys=staged.keys[chosen], sums=staged.sums[chosen]))

    def held(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float) -> list[Held | None]:
        """Views of blocks as they lie in the arena, leased for so long; None for what is not held, or has no checksum to go with it."""
        arena, geometry = self.arena, self.arena.geometry
        slots = self._copies.lookup(_keys(namespace, hashes))
        found = slots[slots >= 0]
        arena.leased_until_ms[found] = _lease_end_ms(lease_s)
        records = arena.records[found]
        sizes = arena.slab_slot_bytes[found // geometry.slots_per_slab].tolist()
        views: list[Held | None] = [None] * len(slots)
        places = np.flatnonzero(slots >= 0).tolist()
        fields = (places, found.tolist(), sizes, records["payload_bytes"].tolist(), records["checksum"].tolist())
        for place, slot, slot_bytes, payload_bytes, checksum in zip(*fields, strict=True):
            start = arena.slot_start(slot, slot_bytes, payload_bytes) if checksum else None
            if start is not None:
                views[place] = Held(arena.bytes[start : start + payload_bytes].data, checksum)
        return views

    def abort(self, staged: Staged) -> None:
        """Lets staged blocks go; their slots stay granted for others."""
        self._give_back(staged.slot_bytes, staged.slots)

    def _take_granted(self, slot_bytes: int, count: int) -> Slots:
        with self._grants_lock:
            granted = self._grants.get(slot_bytes, _NO_SLOTS)
            slots, self._grants[slot_bytes] = granted[:count], granted[count:]
        return slots

    def _give_back(self, slot_bytes: int, slots: Slots) -> None:
        if len(slots):
            with self._grants_lock:
                self._grants[slot_bytes] = np.concatenate([self._grants.get(slot_bytes, _NO_SLOTS), slots])

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        """Copies block i into row i (n, payload_bytes) and verifies it there; a corrupt one is quarantined."""
        self.arena.populate_backed()
        return self.load(namespace, hashes, BlockRows((rows,)), np.arange(len(rows)))

    def load(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        rows: BlockRows,
        block_ids: npt.NDArray[np.int64],
        *,
        only_leading: bool = False,
    ) -> list[BlockOutcome]:
        """Copies block i to block `block_ids[i]` of `rows`; one that is not a hit may be written in part.

        With `only_leading` nothing is copied after the first that is not a hit.
        """
        read = self._copies.scatter(_keys(namespace, hashes), rows, block_ids, now_ms(), only_leading=only_leading)
        is_corrupt = read.outcomes == CORRUPT
        if is_corrupt.any():
            self.room.drop(read.slots[is_corrupt], read.generations[is_corrupt], _QUARANTINE_S)
        return [_OUTCOMES[outcome] for outcome in read.outcomes.tolist()]

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        """Takes blocks out of sight for all readers; how many there were."""
        slots = self._copies.lookup(_keys(namespace, hashes))
        return self.room.drop(slots[slots >= 0])

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        """Size of a held block; None where it is not held. A hint."""
        slot = int(self._copies.lookup(_keys(namespace, [block_hash]))[0])
        return None if slot < 0 else int(self.arena.records["payload_bytes"][slot])

    def make_room(self) -> int:
        """Room ahead of need, slots of dead writers back; how many blocks were evicted."""
        self.upkeep.reclaim()
        self.room.recognize()
        return self.room.keep() + self.quotas.enforce()

    @property
    def evicted_blocks(self) -> int:
        """Evicted by this process so far."""
        return self.room.evicted_slots

    def stats(self) -> StoreStats:
        """What it holds now: whole slots. O(slots), about 50 us for 100,000."""
        geometry = self.arena.geometry
        is_committed = self.arena.state.reshape(geometry.num_slabs, geometry.slots_per_slab) == SlotState.COMMITTED
        blocks = is_committed.sum(axis=1)
        return StoreStats(
            used_bytes=int((blocks * self.arena.slab_slot_bytes).sum()),
            capacity_bytes=geometry.num_slabs * geometry.slab_bytes,
            blocks=int(blocks.sum()),
        )

    def close(self) -> None:
        """Gives granted slots back. Blocks stay."""
        with self._grants_lock:
            grants, self._grants = self._grants, {}
        for slots in grants.values():
            self.room.release(slots)
        self._announcer.close()
        self._writers.close()
        self._lock.close()
        self.arena.close()


def _lease_end_ms(lease_s: float) -> int:
    return now_ms() + int(1000 * min(lease_s, MAX_LEASE_S)) & 0xFFFFFFFF


def _keys(namespace: Namespace, hashes: Sequence[BlockHash]) -> Bytes:
    """Keys (n, 48): namespace and hash."""
    prefix = bytes.fromhex(namespace)
    if not hashes:
        return np.empty((0, _KEY_BYTES), np.uint8)
    return np.frombuffer(bytearray(prefix + prefix.join(hashes)), np.uint8).reshape(len(hashes), _KEY_BYTES)
