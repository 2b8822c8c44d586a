"""A block store in shared memory: one file per block, nameless until it is committed, evicted by age.

Every process of a node uses the same folder; there is no server to wait for. The arena that replaces the files keeps this protocol.
"""

import contextlib
import errno
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.store import BlockOutcome, PutOutcome, StoreStats
from tandem.errors import ConfigError

# Eviction stops here, so that it does not run again at once.
_LOW_WATERMARK_FRACTION = 0.9
# What one process keeps ready: enough for a prompt of 2,000 tokens of the bundled model, and never much memory.
_MAX_SPARES = 64
_MAX_SPARE_BYTES = 64 << 20
_MIN_FREE_BYTES = 256 << 20
# Of a file system that is smaller than the capacity, or filled by others too: with no byte free, no block could ever replace another.
_FILE_SYSTEM_FRACTION = 0.9


class FileReservation:
    """An uncommitted block: a file without a name. The kernel removes it with its last descriptor, so a dead writer leaves nothing."""

    def __init__(self, key: BlockKey, path: str, descriptor: int) -> None:
        self._key = key
        self._path = path
        self._descriptor = descriptor

    def write(self, payload: memoryview) -> None:
        """Writes header and payload; raises OSError where shared memory is full."""
        expected_bytes = HEADER_BYTES + len(payload)
        if os.pwritev(self._descriptor, [pack_header(self._key, payload), payload], 0) != expected_bytes:
            raise OSError(errno.ENOSPC, "short write into shared memory")

    def commit(self) -> None:
        """Gives the file its name; nothing where another writer was first. Raises OSError where the folder cannot be written."""
        with contextlib.suppress(FileExistsError):
            try:
                self._link()
            except FileNotFoundError:  # the namespace's first block
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._link()
        self._close()

    def _link(self) -> None:
        # Any directory descriptor has Python call linkat(2) with AT_SYMLINK_FOLLOW; plain link(2) would link the symbolic link.
        os.link(f"/proc/self/fd/{self._descriptor}", self._path, src_dir_fd=self._descriptor, follow_symlinks=True)

    def abort(self) -> None:
        """Lets the file go; after a failed commit too."""
        self._close()

    def _close(self) -> None:
        """Once only: a second close might hit a file that another thread has opened since."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ShmStore:
    """Blocks as files under `folder`; at most about `capacity_bytes` of them once `evict` has run.

    Raises ConfigError where the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, capacity_bytes: int) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._spares: deque[tuple[int, int]] = deque()  # payload bytes and descriptor of files whose pages are there already
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(self._make_file())  # not every file system has files without a name
        except OSError as error:
            raise ConfigError(f"cannot use {folder} for KV blocks ({error.strerror}): choose another --store-dir") from error

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are committed; about 2 us a block."""
        return [os.path.exists(self._path(key)) for key in keys]

    def try_reserve(self, key: BlockKey, payload_bytes: int) -> FileReservation | None:
        """An unseen file for one block; None where shared memory has no room or cannot be written."""
        try:
            spare_bytes, descriptor = self._spares.pop()
        except IndexError:
            try:
                spare_bytes, descriptor = payload_bytes, self._make_file()
            except OSError:
                return None
        if spare_bytes != payload_bytes:
            os.ftruncate(descriptor, 0)
        return FileReservation(key, self._path(key), descriptor)

    def _make_file(self) -> int:
        flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
        try:
            return os.open(self._folder, flags, 0o600)
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self._folder, flags, 0o600)

    def add_spare(self, payload_bytes: int) -> bool:
        """Makes one file with its pages, so that a later put of that size finds them: fresh pages cost more than the copy.

        False where enough are there, or room is short: what one process keeps ready, no other can use.
        """
        if len(self._spares) >= _MAX_SPARES or (len(self._spares) + 1) * payload_bytes > _MAX_SPARE_BYTES:
            return False
        try:
            if shutil.disk_usage(self._folder).free < _MIN_FREE_BYTES:
                return False
            descriptor = self._make_file()
        except OSError:
            return False
        try:
            os.posix_fallocate(descriptor, 0, HEADER_BYTES + payload_bytes)
        except OSError:
            os.close(descriptor)
            return False
        self._spares.append((payload_bytes, descriptor))
        return True

    def close(self) -> None:
        """Lets the spare files go. Blocks stay."""
        while self._spares:
            os.close(self._spares.pop()[1])

    def put(self, keys: Sequence[BlockKey], payloads: Sequence[memoryview]) -> list[PutOutcome]:
        """Stores a batch; a block that finds no room is left out."""
        return [self._put_one(key, payload) for key, payload in zip(keys, payloads, strict=True)]

    def _put_one(self, key: BlockKey, payload: memoryview) -> PutOutcome:
        if os.path.exists(self._path(key)):
            return PutOutcome.EXISTS
        reservation = self.try_reserve(key, len(payload))
        if reservation is None:
            return PutOutcome.NO_ROOM
        try:
            reservation.write(payload)
            reservation.commit()
        except OSError:
            reservation.abort()
            return PutOutcome.NO_ROOM
        return PutOutcome.STORED

    def get_into(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[BlockOutcome]:
        """Copies and verifies a batch; about 25 us a block of 64 KiB."""
        return [self._get_one(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get_one(self, key: BlockKey, buffer: memoryview) -> BlockOutcome:
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return BlockOutcome.MISSING
        try:
            header = bytearray(HEADER_BYTES)
            spare = bytearray(1)
            read_bytes = os.readv(descriptor, [header, buffer, spare])
            os.utime(descriptor)  # least recently used is told by time of last use
        except OSError:
            return BlockOutcome.MISSING
        finally:
            os.close(descriptor)
        if read_bytes == HEADER_BYTES + len(buffer) and is_intact(key, bytes(header), buffer):
            return BlockOutcome.HIT
        self.quarantine(key)
        return BlockOutcome.CORRUPT

    def payload_bytes(self, key: BlockKey) -> int | None:
        """Size of a held block without its header; None where it is not held. A damaged one may have any size."""
        try:
            return max(0, os.stat(self._path(key)).st_size - HEADER_BYTES)
        except OSError:
            return None

    def quarantine(self, key: BlockKey) -> None:
        """Unlinks the block, so that nobody reads it again."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def evict(self) -> int:
        """Drops the least recently used blocks down to 90 % once over capacity; O(blocks). A full file system counts as over capacity."""
        blocks = [(status.st_mtime, status.st_size, path) for path, status in self._files()]
        if not blocks:
            return 0
        used_bytes = sum(size_bytes for _, size_bytes, _ in blocks)
        limit_bytes = min(self._capacity_bytes, _FILE_SYSTEM_FRACTION * (used_bytes + shutil.disk_usage(self._folder).free))
        if used_bytes <= limit_bytes:
            return 0
        dropped = 0
        for _, size_bytes, path in sorted(blocks):
            if used_bytes <= limit_bytes * _LOW_WATERMARK_FRACTION:
                break
            Path(path).unlink(missing_ok=True)
            used_bytes -= size_bytes
            dropped += 1
        return dropped

    def stats(self) -> StoreStats:
        """Counts the files; O(blocks)."""
        sizes = [status.st_size for _, status in self._files()]
        return StoreStats(used_bytes=sum(sizes), capacity_bytes=self._capacity_bytes, blocks=len(sizes))

    def destroy(self) -> None:
        """Removes the folder; the owner of the cluster calls it last."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path and status of each file; other processes remove files meanwhile."""
        for folder in _scan(self._folder):
            for entry in _scan(folder.path):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                yield entry.path, status

    def _path(self, key: BlockKey) -> str:
        return f"{self._folder}/{key.namespace}/{key.block_hash.hex()}"


def _scan(folder: str | Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
