"""The harness' hand in the node's arena: flipped bits, and a lease that nobody gives back. Must not use the store's own ways to write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np

from kv_transfer.arena import FILE_NAME, Arena, SlotState
from kv_transfer.arena_store import ArenaStore
from tandem.domain import BlockHash, Namespace

_NAMESPACE_BYTES = 16  # of a key; the block's hash follows
_LEASE_S = 60.0  # the longest there is


def flip_blocks(folder: Path, share: float, rng: Random) -> int:
    """Flips one bit each in that share of the committed blocks' payloads; how many. O(slots)."""
    arena, flipped = Arena(folder / FILE_NAME), 0
    try:
        committed = np.flatnonzero(arena.state == SlotState.COMMITTED).tolist()
        for slot in rng.sample(committed, int(len(committed) * share)):
            payload_bytes = int(arena.records["payload_bytes"][slot])
            slot_bytes = int(arena.slab_slot_bytes[slot // arena.geometry.slots_per_slab])
            start = arena.slot_start(slot, slot_bytes, payload_bytes)
            if start is not None and payload_bytes:  # it may have been freed meanwhile
                arena.bytes[start + rng.randrange(payload_bytes)] ^= 1 << rng.randrange(8)
                flipped += 1
    finally:
        arena.close()
    return flipped


@contextmanager
def leaked_lease(folder: Path) -> Iterator[None]:
    """Leases the first committed block as a reader does, and gives it back only at the end. Does nothing in an empty arena."""
    store = ArenaStore(folder, capacity_bytes=0)  # its size is that of the arena that is there
    try:
        slots = np.flatnonzero(store.arena.state == SlotState.COMMITTED)[:1].tolist()
        for slot in slots:
            key = store.arena.key_at(slot)
            store.contains(Namespace(key[:_NAMESPACE_BYTES].hex()), [BlockHash(key[_NAMESPACE_BYTES:])], lease_s=_LEASE_S)
        yield
        for slot in slots:
            store.arena.leased_until_ms[slot] = 0
    finally:
        store.close()
