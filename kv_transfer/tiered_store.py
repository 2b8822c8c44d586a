"""The tiers below the arena, as one: what is asked for comes up, what is evicted and was of use goes down.

Blocking; run it in a thread. Never in an engine's step, and never needed: a tier that fails is a miss.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kv_transfer.arena import SlotState
from kv_transfer.arena_store import ArenaStore
from kv_transfer.arena_upkeep import now_ms
from kv_transfer.copies import Slots
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome, StoreStats, leading_count
from tandem.domain import BlockHash, Namespace

logger = logging.getLogger(__name__)

_BATCH_BLOCKS = 32
_BATCH_BYTES = 16 << 20
_MIN_USES = 1
_LEASE_S = 10.0
_NAMESPACE_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerStats:
    """One tier below the arena: what it holds, what went through since the service started, why it is not used now."""

    stats: StoreStats
    promoted_blocks: int
    demoted_blocks: int
    corrupt_blocks: int
    error: str


class LowerStore(BlockStore, Protocol):
    """A tier that may fail for a while."""

    @property
    def error(self) -> str:
        """Why it is not used now; empty: it is."""


class TieredStore:
    """An arena over `lower` tiers by name: asked in their order, and what goes down goes to the first that is not in trouble."""

    def __init__(self, arena: ArenaStore, lower: Mapping[str, LowerStore]) -> None:
        self._arena = arena
        self._lower = lower
        self.promoted_blocks: dict[str, int] = dict.fromkeys(lower, 0)  # by tier
        self.demoted_blocks: dict[str, int] = dict.fromkeys(lower, 0)
        self.corrupt_blocks: dict[str, int] = dict.fromkeys(lower, 0)
        if lower:
            arena.room.before_evict = self.demote

    def promote(self, namespace: Namespace, hashes: Sequence[BlockHash], first_position: int = 0) -> int:
        """Brings leading blocks up, up to the first that no tier holds; how many are in the arena then."""
        done = leading_count(self._arena.contains(namespace, hashes, lease_s=_LEASE_S))
        while self._lower and done < len(hashes):
            moved = self._promote_batch(namespace, hashes[done : done + _BATCH_BLOCKS], first_position + done)
            done += leading_count(self._arena.contains(namespace, hashes[done:], lease_s=_LEASE_S))
            if not moved:
                break
        return done

    def _promote_batch(self, namespace: Namespace, hashes: Sequence[BlockHash], first_position: int) -> int:
        """Of the tier that holds the first one: its leading run."""
        for name, store in self._lower.items():
            run = leading_count(store.contains(namespace, hashes))
            payload_bytes = store.payload_bytes(namespace, hashes[0]) if run else None
            if not payload_bytes:
                continue
            run = min(run, max(1, _BATCH_BYTES // payload_bytes))
            rows = np.empty((run, payload_bytes), np.uint8)
            outcomes = store.get_into(namespace, hashes[:run], rows)
            good = leading_count([outcome is BlockOutcome.HIT for outcome in outcomes])
            self.corrupt_blocks[name] += outcomes.count(BlockOutcome.CORRUPT)
            stored = self._arena.put(namespace, hashes[:good], rows[:good], first_position=first_position) if good else []
            self.promoted_blocks[name] += stored.count(PutOutcome.STORED)
            if good and PutOutcome.NO_ROOM not in stored:
                return good
        return 0

    def demote(self, slots: Slots, *, min_uses: int = _MIN_USES, ends_s: float = float("inf")) -> int:
        """Copies blocks that are about to be evicted down, where they were of use again; how many went."""
        slots = slots[(self._arena.arena.state[slots] == SlotState.COMMITTED) & (self._arena.arena.uses[slots] >= min_uses)]
        gone = 0
        for namespace, payload_bytes, hashes in self._groups(slots):
            for start in range(0, len(hashes), step := max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // payload_bytes))):
                if time.monotonic() > ends_s:
                    return gone
                gone += self._demote_batch(namespace, hashes[start : start + step], payload_bytes)
        return gone

    def _groups(self, slots: Slots) -> list[tuple[Namespace, int, list[BlockHash]]]:
        groups: dict[tuple[Namespace, int], list[BlockHash]] = {}
        records = self._arena.arena.records[slots]
        for key, payload_bytes in zip(records["key"], records["payload_bytes"].tolist(), strict=True):
            raw = bytes(key)
            group = groups.setdefault((Namespace(raw[:_NAMESPACE_BYTES].hex()), payload_bytes), [])
            group.append(BlockHash(raw[_NAMESPACE_BYTES:]))
        return [(namespace, payload_bytes, hashes) for (namespace, payload_bytes), hashes in groups.items() if payload_bytes > 0]

    def _demote_batch(self, namespace: Namespace, hashes: list[BlockHash], payload_bytes: int) -> int:
        """Into the first tier that takes blocks now."""
        if payload_bytes > self._arena.arena.geometry.slab_bytes:
            return 0
        name, store = next(((name, store) for name, store in self._lower.items() if not store.error), (None, None))
        if store is None or name is None:
            return 0
        held = store.contains(namespace, hashes)
        hashes = [block_hash for block_hash, is_held in zip(hashes, held, strict=True) if not is_held]
        if not hashes:
            return 0
        rows = np.empty((len(hashes), payload_bytes), np.uint8)
        outcomes = self._arena.get_into(namespace, hashes, rows)
        good = [index for index, outcome in enumerate(outcomes) if outcome is BlockOutcome.HIT]
        stored = store.put(namespace, [hashes[index] for index in good], rows[good]).count(PutOutcome.STORED) if good else 0
        self.demoted_blocks[name] += stored
        return stored

    def flush(self, timeout_s: float) -> int:
        """Copies down what the arena holds, the latest used first, as long as there is time: it is about to end; how many went."""
        if not self._lower:
            return 0
        arena = self._arena.arena
        committed = np.flatnonzero(arena.state == SlotState.COMMITTED).astype(np.int32)
        ages_ms = np.uint32(now_ms()) - arena.last_use_ms[committed]  # across the clock's wrap
        latest = committed[np.argsort(ages_ms, kind="stable")]
        return self.demote(latest, min_uses=0, ends_s=time.monotonic() + timeout_s)

    def stats(self) -> dict[str, LowerStats]:
        """Of the lower tiers, by name."""
        return {
            name: LowerStats(
                stats=store.stats(),
                promoted_blocks=self.promoted_blocks[name],
                demoted_blocks=self.demoted_blocks[name],
                corrupt_blocks=self.corrupt_blocks[name],
                error=store.error,
            )
            for name, store in self._lower.items()
        }

    def close(self) -> None:
        """Closes the lower tiers."""
        for store in self._lower.values():
            store.close()
