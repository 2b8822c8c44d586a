"""The disk tier: blocks in segment files on a local disk, which survive a restart of everything.

A block that the disk has spoilt is a miss; a disk in trouble is one log line and a pause, never an exception. Nothing waits for the disk
to have blocks for certain: after a power loss the last seconds are missing, and half a block is seen as such.
"""

import errno
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact
from kv_transfer.disk_log import DiskLog
from kv_transfer.disk_segments import SegmentReader
from kv_transfer.outage import Outage
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome, StoreStats
from tandem.domain import BlockHash, Namespace

logger = logging.getLogger(__name__)

_HIGH_FRACTION, _LOW_FRACTION = 15 / 16, 14 / 16
_MAX_LEASE_S = 60.0
_LOOKUPS = 3  # a block may be moved between its lookup and its read


class DiskStore:
    """`BlockStore` in `folder`, for one process at a time and any of its threads. `log` is open to tests.

    While a segment is evicted the files may take half of one (of 64 MiB, or a sixteenth of the capacity) more than `capacity_bytes`.
    After an error the disk is left alone for `pause_s`, longer each time. Opening reads the header of each block.
    Raises ConfigError where the folder cannot be used, another process has it, or it is of another format.
    """

    def __init__(self, folder: Path, *, capacity_bytes: int, pause_s: float = 2.0) -> None:
        self._is_closed = False
        self._lock = threading.Lock()  # of whoever changes something: gets look blocks up and read them without
        self._reads = Outage(f"disk {folder}, reading", pause_s=pause_s)
        self._writes = Outage(f"disk {folder}, writing", pause_s=pause_s)
        started_s = time.monotonic()
        self.log = DiskLog(folder, capacity_bytes=capacity_bytes)
        self.make_room()  # it may have been larger before
        logger.info(
            "kv_disk_opened folder=%s blocks=%d used_bytes=%d lost_bytes=%d took_s=%.3f",
            folder,
            len(self.log.index),
            self.log.used_bytes,
            self.log.lost_bytes,
            time.monotonic() - started_s,
        )

    @property
    def error(self) -> str:
        """What is wrong with the disk; empty while all is well."""
        return self._writes.error or self._reads.error

    @property
    def lost_bytes(self) -> int:
        """What was cut off when it was opened: half a block at an end, or all that is behind a header that does not hold."""
        return self.log.lost_bytes

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        """Which blocks are held, as far as the disk can be read; those are not evicted for `lease_s`, 60 s at most. O(hashes)."""
        if self._reads.is_on:
            return [False] * len(hashes)
        prefix = bytes.fromhex(namespace)
        entries = [self.log.index.get(prefix + one) for one in hashes]
        if lease_s > 0.0:
            until_s = time.monotonic() + min(lease_s, _MAX_LEASE_S)
            for entry in entries:
                if entry is not None:
                    entry.leased_until_s = until_s
        return [entry is not None for entry in entries]

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        """Appends the blocks that are not there. NO_ROOM also where the disk takes none. May evict, and take as long as the disk does."""
        prefix = bytes.fromhex(namespace)
        keys = [prefix + one for one in hashes]
        new: dict[bytes, int] = {}
        with self._lock:
            for position, key in enumerate(keys):
                if key not in self.log.index:
                    new.setdefault(key, position)
            blocks = [(key, np.ascontiguousarray(rows[position]).data) for key, position in new.items()]
            stored = self._append(blocks) if blocks and not self._is_closed and self._writes.allows() else 0
        failed = {key for key, _ in blocks[stored:]}
        outcomes = [PutOutcome.NO_ROOM if key in failed else PutOutcome.EXISTS for key in keys]
        for key, _ in blocks[:stored]:
            outcomes[new[key]] = PutOutcome.STORED
        return outcomes

    def _append(self, blocks: Sequence[tuple[bytes, memoryview]]) -> int:
        """How many of the blocks, the leading ones, are stored."""
        stored = 0
        try:
            while stored < len(blocks) and (count := self.log.append(blocks[stored:])):
                stored += count
                self._writes.end()
        except OSError as error:
            self._writes.begin(error.strerror or str(error))
        return stored

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        """Reads block i into row i (n, payload_bytes) and verifies it there. MISSING also where the disk cannot be read."""
        outcomes = [BlockOutcome.MISSING] * len(hashes)
        if not self._reads.allows():
            return outcomes
        with SegmentReader() as reader:
            for position, (one, row) in enumerate(zip(hashes, rows, strict=True)):
                try:
                    outcomes[position] = self._get(BlockKey(namespace, one), row, reader)
                except OSError as error:
                    self._reads.begin(error.strerror or str(error))
                    break
        return outcomes

    def _get(self, wanted: BlockKey, row: Bytes, reader: SegmentReader) -> BlockOutcome:
        key = bytes.fromhex(wanted.namespace) + wanted.block_hash
        into = row if row.flags.c_contiguous else np.empty_like(row)
        header, payload = bytearray(HEADER_BYTES), into.data
        for _ in range(_LOOKUPS):
            entry = self.log.index.get(key)
            if entry is None or entry.payload_bytes != len(payload):
                break
            try:
                reader.read(entry.segment, entry.offset_bytes, [header, payload])
                if is_intact(wanted, bytes(header), payload):
                    if into is not row:
                        row[:] = into
                    entry.used_s = time.monotonic()
                    self._reads.end()
                    return BlockOutcome.HIT
                with self._lock:
                    if self.log.drop(key, entry):
                        return BlockOutcome.CORRUPT
            except FileNotFoundError:  # evicted since, or deleted by somebody else
                with self._lock:
                    if self.log.index.get(key) is entry:
                        self.log.lose(entry.segment)
            except OSError as error:
                if error.errno == errno.EIO:  # perhaps this block alone
                    with self._lock:
                        self.log.drop(key, entry)
                raise
        return BlockOutcome.MISSING

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        """Size of a held block; None where it is not held. A hint."""
        entry = self.log.index.get(bytes.fromhex(namespace) + block_hash)
        return None if entry is None else entry.payload_bytes

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        """Takes blocks out of sight, after a restart too unless the disk cannot be written; how many there were."""
        prefix = bytes.fromhex(namespace)
        with self._lock:
            return sum(self.log.drop(prefix + one) for one in hashes)

    def make_room(self) -> int:
        """From 15/16 of the capacity down to 14/16, ahead of need; how many blocks were evicted. May take as long as the disk does."""
        evicted = 0
        with self._lock:
            capacity_bytes = self.log.capacity_bytes
            if self.log.used_bytes > _HIGH_FRACTION * capacity_bytes:
                try:
                    while self.log.used_bytes > _LOW_FRACTION * capacity_bytes and (gone := self.log.evict()) is not None:
                        evicted += gone
                except OSError as error:
                    self._writes.begin(error.strerror or str(error))
        return evicted

    def stats(self) -> StoreStats:
        """What the files take, dropped blocks included until their segment goes."""
        return StoreStats(used_bytes=self.log.used_bytes, capacity_bytes=self.log.capacity_bytes, blocks=len(self.log.index))

    def close(self) -> None:
        """Lets another process use the folder. Blocks stay; what is asked here after it is missing."""
        with self._lock:
            self._is_closed = True
            self.log.close()
