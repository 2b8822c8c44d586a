"""A block store in shared memory: one file per block, visible by rename, evicted by age.

Every process of a node uses the same folder; there is no server to wait for. The arena that replaces the files keeps this protocol.
"""

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.store import BlockOutcome, PutOutcome, StoreStats
from tandem.errors import ConfigError

_PART_SUFFIX = ".part"
# A writer that has not committed after this time is dead or stuck; its room is given back.
_STALE_PART_S = 30.0
# Eviction stops here, so that it does not run again at once.
_LOW_WATERMARK_FRACTION = 0.9
# Of a file system that is smaller than the capacity, or filled by others too: with no byte free, no block could ever replace another.
_FILE_SYSTEM_FRACTION = 0.9


class FileReservation:
    """An uncommitted block file."""

    def __init__(self, key: BlockKey, path: Path, part: Path, descriptor: int) -> None:
        self._key = key
        self._path = path
        self._part = part
        self._descriptor = descriptor

    def write(self, payload: memoryview) -> None:
        """Writes header and payload; raises OSError where shared memory is full."""
        expected_bytes = HEADER_BYTES + len(payload)
        if os.writev(self._descriptor, [pack_header(self._key, payload), payload]) != expected_bytes:
            raise OSError(errno.ENOSPC, "short write into shared memory")

    def commit(self) -> None:
        """Renames the file into sight; raises OSError where it was given back as stale, or the folder is gone."""
        self._close()
        self._part.rename(self._path)

    def abort(self) -> None:
        """Unlinks the file; after a failed commit too."""
        self._close()
        self._part.unlink(missing_ok=True)

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
        self._part_numbers = itertools.count()
        self._part_token = secrets.token_hex(4)  # a process may have several stores, and process ids come again
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {folder} for KV blocks ({error.strerror}): choose another --store-dir") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write KV blocks into {folder}: choose another --store-dir")

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are committed; about 2 us a block."""
        return [os.path.exists(self._path(key)) for key in keys]

    def try_reserve(self, key: BlockKey, payload_bytes: int) -> FileReservation | None:
        """An unseen file for one block; None where shared memory has no room or cannot be written."""
        path = Path(self._path(key))
        part = path.with_name(f"{path.name}.{os.getpid()}.{self._part_token}.{next(self._part_numbers)}{_PART_SUFFIX}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            try:
                descriptor = os.open(part, flags, 0o600)
            except FileNotFoundError:
                part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(part, flags, 0o600)
        except OSError:
            return None
        return FileReservation(key, path, part, descriptor)

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

    def quarantine(self, key: BlockKey) -> None:
        """Unlinks the block, so that nobody reads it again."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def evict(self) -> int:
        """Drops stale unfinished files, then the least recently used blocks down to 90 % once over capacity; O(blocks).

        A full file system counts as over capacity.
        """
        blocks: list[tuple[float, int, str]] = []
        for path, status in self._files():
            if not path.endswith(_PART_SUFFIX):
                blocks.append((status.st_mtime, status.st_size, path))
            # File times are wall-clock times; a step of that clock costs blocks, never correctness.
            elif time.time() - status.st_mtime > _STALE_PART_S:
                Path(path).unlink(missing_ok=True)
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
        sizes = [status.st_size for path, status in self._files() if not path.endswith(_PART_SUFFIX)]
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
