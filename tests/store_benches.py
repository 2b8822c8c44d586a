"""Kinds of block stores for the tests that all of them must pass."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from kv_transfer.blocks import BlockKey
from kv_transfer.shm_store import ShmStore
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome
from tests.dict_store import DictStore, key

A, B = key(1), key(2)
PAYLOAD = bytes(range(256)) * 4
OTHER = PAYLOAD[::-1]
ROOMY_BYTES = 1 << 30


class Bench(Protocol):
    """A kind of store, and what a test must do behind its back."""

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> BlockStore:
        """The store; a second call gives another user of the same blocks."""

    def full(self) -> AbstractContextManager[BlockStore]:
        """A store of the same kind that has no room for a PAYLOAD."""

    def raw(self, wanted: BlockKey) -> bytes:
        """All bytes stored of a block."""

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        """Damages a block."""

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        """Makes a block's last use look older."""

    def leftovers(self) -> list[str]:
        """What is kept and is no visible block, of both stores."""


class DictBench:
    def __init__(self, tmp_path: Path) -> None:
        self._store = DictStore()

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> DictStore:
        if capacity_bytes != ROOMY_BYTES:
            self._store = DictStore(capacity_bytes=capacity_bytes)
        return self._store

    @contextmanager
    def full(self) -> Iterator[DictStore]:
        yield DictStore(max_bytes=100)

    def raw(self, wanted: BlockKey) -> bytes:
        return self._store.blocks[wanted]

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        self._store.blocks[wanted] = stored

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        self._store.used_s[wanted] = -age_s

    def leftovers(self) -> list[str]:
        return []


class ShmBench:
    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"
        self._full_folder = tmp_path / "full"

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> ShmStore:
        return ShmStore(self.folder, capacity_bytes=capacity_bytes)

    @contextmanager
    def full(self) -> Iterator[ShmStore]:
        """By the limit on file sizes, which the kernel checks where it checks for room."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        store = ShmStore(self._full_folder, capacity_bytes=ROOMY_BYTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(PAYLOAD) // 2, hard))
        try:
            yield store
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def path(self, wanted: BlockKey) -> Path:
        return self.folder / wanted.namespace / wanted.block_hash.hex()

    def raw(self, wanted: BlockKey) -> bytes:
        return self.path(wanted).read_bytes()

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        self.path(wanted).write_bytes(stored)

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        used_s = time.time() - age_s
        os.utime(self.path(wanted), (used_s, used_s))

    def leftovers(self) -> list[str]:
        return [
            path.name
            for folder in (self.folder, self._full_folder)
            for path in folder.rglob("*")
            if path.is_file() and len(path.name) != 64
        ]


BENCHES: dict[str, Callable[[Path], Bench]] = {"dict": DictBench, "shm": ShmBench}
SHARED_BY_PROCESSES = ("shm",)


def put(store: BlockStore, wanted: BlockKey, payload: bytes = PAYLOAD) -> PutOutcome:
    return store.put([wanted], [memoryview(payload)])[0]


def get(store: BlockStore, wanted: BlockKey, payload_bytes: int = len(PAYLOAD)) -> tuple[BlockOutcome, bytes]:
    buffer = bytearray(payload_bytes)
    outcome = store.get_into([wanted], [memoryview(buffer)])[0]
    return outcome, bytes(buffer)
