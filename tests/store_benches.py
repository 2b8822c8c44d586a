"""Kinds of block stores for the tests that all of them must pass."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kv_transfer.arena import RECORD
from kv_transfer.arena_store import ArenaStore
from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES
from kv_transfer.store import BlockOutcome, BlockStore, Bytes, PutOutcome
from tandem.domain import BlockHash
from tests.arena_blocks import ArenaBlocks
from tests.dict_store import DictStore, key
from tests.lower_tier_benches import DiskBench, KvRedisBench

A, B = key(1), key(2)
PAYLOAD = bytes(range(256)) * 4
OTHER = PAYLOAD[::-1]
ROOMY_BYTES = 4 << 20
SMALL_BYTES = 1 << 20


class Bench(Protocol):
    """A kind of store, and what a test must do behind its back."""

    record_bytes: int  # what is checked of a block besides its payload

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> BlockStore:
        """The store; a second call gives another user of the same blocks."""

    def full(self) -> BlockStore:
        """A store of the same kind that has no room for a PAYLOAD, and no block."""

    def damage(self, wanted: BlockKey, position: int) -> None:
        """Changes a byte of a block's payload."""

    def damage_record(self, wanted: BlockKey, position: int) -> None:
        """Changes a byte of what is kept of a block besides."""

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        """Makes a block's last use look older."""

    def end_lease(self, wanted: BlockKey) -> None:
        """The time of a block's lease is over."""

    def leftovers(self) -> int:
        """Once all users have closed: how much room is neither free nor a visible block's."""

    def close(self) -> None:
        """Closes all users."""


class DictBench:
    record_bytes = HEADER_BYTES

    def __init__(self, tmp_path: Path) -> None:
        self._store = DictStore()

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> DictStore:
        if capacity_bytes != ROOMY_BYTES:
            self._store = DictStore(capacity_bytes=capacity_bytes)
        return self._store

    def full(self) -> DictStore:
        return DictStore(capacity_bytes=100)

    def damage(self, wanted: BlockKey, position: int) -> None:
        self.damage_record(wanted, HEADER_BYTES + position)

    def damage_record(self, wanted: BlockKey, position: int) -> None:
        stored = bytearray(self._store.blocks[wanted])
        stored[position] ^= 0x10
        self._store.blocks[wanted] = bytes(stored)

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        self._store.used_s[wanted] = -age_s

    def end_lease(self, wanted: BlockKey) -> None:
        del self._store.leased_until_s[wanted]

    def leftovers(self) -> int:
        return 0

    def close(self) -> None:
        return


class ArenaBench:
    record_bytes = RECORD.itemsize

    def __init__(self, tmp_path: Path, *, is_native: bool = True) -> None:
        self.folder = tmp_path / "store"
        self._full_folder = tmp_path / "full"
        self._is_native = is_native
        self._open: list[ArenaStore] = []
        self._blocks: ArenaBlocks | None = None

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> ArenaStore:
        store = self._made(self.folder, capacity_bytes)
        assert store.is_native == self._is_native
        return store

    def _made(self, folder: Path, capacity_bytes: int) -> ArenaStore:
        self._open.append(ArenaStore(folder, capacity_bytes=capacity_bytes, native=self._is_native))
        return self._open[-1]

    @property
    def blocks(self) -> ArenaBlocks:
        """The arena from behind."""
        if self._blocks is None:
            self._blocks = ArenaBlocks(self.folder)
        return self._blocks

    def full(self) -> ArenaStore:
        """All of it granted to another writer."""
        store, other = (self._made(self._full_folder, SMALL_BYTES) for _ in range(2))
        assert other.prepare(len(PAYLOAD), 1 << 20) == SMALL_BYTES // len(PAYLOAD)
        return store

    def damage(self, wanted: BlockKey, position: int) -> None:
        self.blocks.flip(wanted, position, 0x10)

    def damage_record(self, wanted: BlockKey, position: int) -> None:
        self.blocks.flip_record(wanted, position, 0x10)

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        self.blocks.age(wanted, age_s)

    def end_lease(self, wanted: BlockKey) -> None:
        self.blocks.end_lease(wanted)

    def leftovers(self) -> int:
        return len(self.blocks.granted())

    def close(self) -> None:
        for store in self._open:
            store.close()
        self._open.clear()
        if self._blocks is not None:
            self._blocks.close()


BENCHES: dict[str, Callable[[Path], Bench]] = {
    "dict": DictBench,
    "arena": ArenaBench,
    "arena-numpy": lambda tmp_path: ArenaBench(tmp_path, is_native=False),
    "disk": DiskBench,
    "kv-redis": KvRedisBench,
}
SHARED_BY_PROCESSES = ("arena", "arena-numpy")


def as_rows(*payloads: bytes) -> Bytes:
    """Payloads of one size as rows (n, payload_bytes)."""
    return np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), len(payloads[0]) if payloads else 0)


def hashes_of(keys: Sequence[BlockKey]) -> list[BlockHash]:
    return [one.block_hash for one in keys]


def put(store: BlockStore, wanted: BlockKey, payload: bytes = PAYLOAD) -> PutOutcome:
    return store.put(wanted.namespace, [wanted.block_hash], as_rows(payload))[0]


def get(store: BlockStore, wanted: BlockKey, payload_bytes: int = len(PAYLOAD)) -> tuple[BlockOutcome, bytes]:
    """The outcome, and the bytes of a hit."""
    rows = np.zeros((1, payload_bytes), np.uint8)
    outcome = store.get_into(wanted.namespace, [wanted.block_hash], rows)[0]
    return outcome, rows.tobytes() if outcome is BlockOutcome.HIT else b""


def held(store: BlockStore, keys: Sequence[BlockKey]) -> list[bool]:
    """Which of the blocks of one namespace are there."""
    return store.contains(keys[0].namespace, hashes_of(keys)) if keys else []
