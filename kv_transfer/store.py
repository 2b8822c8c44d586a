"""What every block store offers: two-phase put, checked get, quarantine.

A missing block is a value, never an exception. Implementations: `shm_store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kv_transfer.blocks import BlockKey


class BlockOutcome(StrEnum):
    """What became of one block of a get."""

    HIT = "hit"
    MISSING = "missing"
    CORRUPT = "corrupt"


class PutOutcome(StrEnum):
    """What became of one block of a put."""

    STORED = "stored"
    EXISTS = "exists"
    NO_ROOM = "no_room"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What a store holds."""

    used_bytes: int
    capacity_bytes: int
    blocks: int


class Reservation(Protocol):
    """Room for one block that readers cannot see until `commit`."""

    def write(self, payload: memoryview) -> None:
        """Fills the room, header and checksum included."""

    def commit(self) -> None:
        """Makes the block visible at once and whole."""

    def abort(self) -> None:
        """Gives the room back."""


class BlockStore(Protocol):
    """Blocks by content address. Safe to use from several processes and threads."""

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are committed; a hint that is checked at use."""

    def try_reserve(self, key: BlockKey, payload_bytes: int) -> Reservation | None:
        """First phase of a put; None where there is no room."""

    def put(self, keys: Sequence[BlockKey], payloads: Sequence[memoryview]) -> list[PutOutcome]:
        """Both phases for a batch; blocks that are there already are not written again."""

    def get_into(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[BlockOutcome]:
        """Copies each block into its buffer (exactly payload bytes) and verifies it there; a corrupt one is quarantined."""

    def quarantine(self, key: BlockKey) -> None:
        """Takes a block out of sight for all readers."""

    def add_spare(self, payload_bytes: int) -> bool:
        """Prepares room for one more block of that size; False where enough is prepared. Called when nobody waits."""

    def close(self) -> None:
        """Gives back what this process holds; blocks stay."""

    def evict(self) -> int:
        """Brings the store under its capacity, least recently used first; returns the blocks dropped."""

    def stats(self) -> StoreStats:
        """Sizes now; O(blocks)."""


def leading_count(flags: Sequence[bool]) -> int:
    """How many of the first flags are all true."""
    return next((index for index, flag in enumerate(flags) if not flag), len(flags))
