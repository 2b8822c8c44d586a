"""The tiers below the arena, for the tests that all block stores must pass."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoConnection

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES
from kv_transfer.disk_log import Entry
from kv_transfer.disk_store import DiskStore
from kv_transfer.kv_redis_store import KvRedisStore, kv_redis_arguments
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome, StoreStats
from tandem.domain import BlockHash, Namespace
from tandem.redis_server import find_redis_server

ROOMY_BYTES = 4 << 20
CLUSTER = "test"
# What a block of 1 KiB takes there besides its bytes, and the least that a server needs for itself.
_MEMORY_FACTOR, _MEMORY_BYTES = 1.5, 1 << 20


def index_key(wanted: BlockKey) -> bytes:
    """As stores put namespace and hash together."""
    return bytes.fromhex(wanted.namespace) + wanted.block_hash


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    """Changes a byte of a file in place."""
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


class DiskUser:
    """A user of the one store on a folder. Its `close` restarts that store, for the others to go on with."""

    def __init__(self, bench: "DiskBench") -> None:
        self._bench = bench

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        return self._bench.store.contains(namespace, hashes, lease_s=lease_s)

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        return self._bench.store.put(namespace, hashes, rows, first_position=first_position)

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        return self._bench.store.get_into(namespace, hashes, rows)

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        return self._bench.store.payload_bytes(namespace, block_hash)

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        return self._bench.store.drop(namespace, hashes)

    def make_room(self) -> int:
        return self._bench.store.make_room()

    def stats(self) -> StoreStats:
        return self._bench.store.stats()

    def close(self) -> None:
        self._bench.restart()


class DiskBench:
    record_bytes = HEADER_BYTES

    def __init__(self, tmp_path: Path) -> None:
        self._folder = tmp_path / "disk"
        self._full = DiskStore(tmp_path / "full", capacity_bytes=100)
        self._capacity_bytes = ROOMY_BYTES
        self._store: DiskStore | None = None

    @property
    def store(self) -> DiskStore:
        """Opened again by whoever asks first after a restart."""
        if self._store is None:
            self._store = DiskStore(self._folder, capacity_bytes=self._capacity_bytes)
        return self._store

    def restart(self) -> None:
        """As another process would find the folder."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> DiskUser:
        if self._store is None:
            self._capacity_bytes = capacity_bytes
            self._store = DiskStore(self._folder, capacity_bytes=capacity_bytes)
        return DiskUser(self)

    def full(self) -> DiskStore:
        return self._full

    def _entry(self, wanted: BlockKey) -> Entry:
        return self.store.log.index[index_key(wanted)]

    def damage(self, wanted: BlockKey, position: int) -> None:
        self.damage_record(wanted, HEADER_BYTES + position)

    def damage_record(self, wanted: BlockKey, position: int) -> None:
        entry = self._entry(wanted)
        flip(entry.segment.path, entry.offset_bytes + position)

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        # Blocks age in the order in which they were put: what can be taken back is a use since.
        self._entry(wanted).used_s = 0.0

    def end_lease(self, wanted: BlockKey) -> None:
        self._entry(wanted).leased_until_s = 0.0

    def leftovers(self) -> int:
        return 0

    def close(self) -> None:
        self.restart()
        self._full.close()


class KvRedisServer:
    """A server for KV blocks in a folder; it can be killed, stopped and started again. `url` stays the same."""

    def __init__(self, maxmemory_bytes: int, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kv-redis-")  # a socket's path must be short
        socket_path = Path(self._folder.name) / "kv.sock"
        self.url = f"unix://{socket_path}"
        self._command = [
            str(find_redis_server()),
            *kv_redis_arguments(socket_path, Path(self._folder.name), maxmemory_bytes),
            *arguments,
        ]
        self.inside = Redis.from_url(self.url, protocol=2)
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline_s = monotonic() + 10.0
        while True:
            try:
                self.inside.ping()
            except NoConnection:
                assert monotonic() < deadline_s
                sleep(0.005)
            else:
                return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Empty."""
        self.process = self._start()

    def close(self) -> None:
        self.inside.close()
        self.kill()
        self._folder.cleanup()


class KvRedisBench:
    record_bytes = HEADER_BYTES

    def __init__(self, tmp_path: Path) -> None:
        self._server: KvRedisServer | None = None
        self._full: KvRedisServer | None = None
        self._open: list[KvRedisStore] = []

    def _made(self, server: KvRedisServer) -> KvRedisStore:
        self._open.append(KvRedisStore(server.url, cluster=CLUSTER, timeout_s=10.0))
        return self._open[-1]

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> KvRedisStore:
        if self._server is None:
            self._server = KvRedisServer(int(_MEMORY_FACTOR * capacity_bytes) + _MEMORY_BYTES)
        return self._made(self._server)

    def full(self) -> KvRedisStore:
        self._full = KvRedisServer(1)
        return self._made(self._full)

    def damage(self, wanted: BlockKey, position: int) -> None:
        self.damage_record(wanted, HEADER_BYTES + position)

    def damage_record(self, wanted: BlockKey, position: int) -> None:
        assert self._server is not None
        name = redis_key(wanted)
        stored = self._server.inside.getrange(name, position, position)
        assert isinstance(stored, bytes)
        self._server.inside.setrange(name, position, chr(stored[0] ^ 0x10).encode("latin-1"))

    def set_age_s(self, wanted: BlockKey, age_s: float) -> NoReturn:
        pytest.skip("the server evicts, by samples and ages of its own: no test can make a block look older there")

    def end_lease(self, wanted: BlockKey) -> NoReturn:
        pytest.skip("the server evicts, and knows no leases")

    def leftovers(self) -> int:
        return 0

    def close(self) -> None:
        for store in self._open:
            store.close()
        for server in (self._server, self._full):
            if server is not None:
                server.close()


def redis_key(wanted: BlockKey) -> bytes:
    """Where a block of CLUSTER lies."""
    return f"{CLUSTER}:kv:".encode() + index_key(wanted)
