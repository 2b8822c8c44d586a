"""How much of an arena one model, or one tenant, may fill: beyond it, their own least recently used blocks go.

Enforced by the store service every second, so a burst may be over for that long. Losing one is a recompute, so nothing is refused.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kv_transfer.arena import Arena, SlotState
from kv_transfer.arena_room import ArenaRoom
from kv_transfer.arena_upkeep import now_ms
from kv_transfer.copies import Slots
from tandem.domain import Namespace

_FOLDER = "quotas"  # a file for each namespace that has one, written by the replicas that serve it
_LOW_FRACTION = 0.95  # of a quota: eviction stops here, so that it does not run again at once


def tenant_of(cache_salt: str) -> int:
    """The number under which a tenant's blocks are counted: of its salt, which keeps its blocks apart. 0 without one."""
    return xxhash.xxh3_64_intdigest(cache_salt.encode()) if cache_salt else 0


class Quotas:
    """Of the arena in `folder`. `tenant_bytes` is what any one tenant may hold; 0: no limit."""

    def __init__(self, folder: Path, arena: Arena, room: ArenaRoom, *, tenant_bytes: int = 0) -> None:
        self._folder = folder / _FOLDER
        self._arena = arena
        self._room = room
        self.tenant_bytes = tenant_bytes

    def set_model(self, namespace: Namespace, quota_bytes: int) -> None:
        """What blocks of that namespace may take; 0: no limit. Raises OSError."""
        if quota_bytes:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / namespace).write_text(str(quota_bytes))
        else:
            (self._folder / namespace).unlink(missing_ok=True)

    def enforce(self) -> int:
        """Evicts what is over; how many blocks. O(slots) where there is a quota, else one look at a folder."""
        models = self._models()
        if not models and not self.tenant_bytes:
            return 0
        arena, geometry = self._arena, self._arena.geometry
        slots = np.flatnonzero(arena.state == SlotState.COMMITTED).astype(np.int32)
        slot_bytes = arena.slab_slot_bytes[slots // geometry.slots_per_slab].astype(np.int64)
        records = arena.records[slots]
        evicted = 0
        for namespace, quota_bytes in models.items():
            is_own = (records["key"][:, :16] == np.frombuffer(bytes.fromhex(namespace), np.uint8)).all(axis=1)
            evicted += self._shrink(slots[is_own], slot_bytes[is_own], quota_bytes)
        if self.tenant_bytes:
            for tenant in np.unique(records["tenant"]).tolist():
                is_own = records["tenant"] == tenant
                evicted += self._shrink(slots[is_own], slot_bytes[is_own], self.tenant_bytes) if tenant else 0
        return evicted

    def _shrink(self, slots: Slots, slot_bytes: npt.NDArray[np.int64], quota_bytes: int) -> int:
        excess_bytes = int(slot_bytes.sum()) - quota_bytes
        if excess_bytes <= 0:
            return 0
        # The latest first; what fits below the low mark stays.
        order = np.argsort(np.uint32(now_ms()) - self._arena.last_use_ms[slots], kind="stable")
        is_kept = np.cumsum(slot_bytes[order]) <= _LOW_FRACTION * quota_bytes
        return self._room.evict(slots[order[~is_kept]])

    def _models(self) -> dict[str, int]:
        try:
            files = list(self._folder.iterdir())
        except FileNotFoundError:
            return {}
        found: dict[str, int] = {}
        for file in files:
            try:
                bytes.fromhex(file.name)
                found[file.name] = int(file.read_text())
            except (ValueError, OSError):  # no file of ours, or being written
                continue
        return found
