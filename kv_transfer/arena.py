"""A node's arena: one file in shared memory, mapped by every process that puts or gets blocks; its table of slots, its index, its slabs.

Only the layout and its views: who may change what is in `arena_store.py`. Self-describing: the slots' records are enough to build the
index again.
"""

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from tandem.errors import ConfigError, Reason

FILE_NAME = "arena"
KEY_BYTES = 48  # namespace, block hash
CELLS_PER_BUCKET = 8  # one line of 64 bytes

_MAGIC = b"TKVARENA"
_VERSION = 1
_PAGE_BYTES = 4096
# magic, version, slabs, slots a slab, buckets, bytes of a slab
_HEADER = struct.Struct("<8sIIIIQ")
_HEADER_SUM = struct.Struct("<Q")
_MIN_SLAB_BYTES, _MAX_SLAB_BYTES = 1 << 16, 1 << 26
_SLABS = 32  # at least; of the smallest and the largest arenas more
_MAX_SLOTS_PER_SLAB = 4096
_MIN_SLOT_BYTES = 256
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of linux/mman.h (5.14), not in Python's mmap

# Of one slot; written by its owner before the slot is committed, read by everybody. `sum` covers what is before it.
RECORD = np.dtype(
    [
        ("key", "u1", KEY_BYTES),
        ("payload_bytes", "<u8"),
        ("checksum", "<u8"),
        ("position", "<u8"),
        ("tenant", "<u8"),
        ("sum", "<u8"),
        ("reserved", "u1", 8),
    ]
)
_SUMMED_WORDS = KEY_BYTES // 8 + 4

Bytes = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)


class SlotState(IntEnum):
    """Of one slot. FREE to GRANTED and COMMITTED to FREE under the lock; GRANTED to COMMITTED by the owner, under the lock too."""

    FREE = 0
    GRANTED = 1
    COMMITTED = 2


class SlabState(IntEnum):
    """Of one slab: without memory, being given memory by `slab_owner`, with memory. A slab in use has a slot size besides."""

    ABSENT = 0
    BACKING = 1
    BACKED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What follows from an arena's size. A slab holds slots of one size; slot s is in slab s // slots_per_slab."""

    num_slabs: int
    slots_per_slab: int
    num_buckets: int
    slab_bytes: int

    @classmethod
    def of_capacity(cls, capacity_bytes: int) -> "Geometry":
        """For about `capacity_bytes` of blocks, rounded down to whole slabs of 64 KiB to 64 MiB."""
        slab_bytes = min(_MAX_SLAB_BYTES, max(_MIN_SLAB_BYTES, 1 << max(0, (capacity_bytes // _SLABS).bit_length() - 1)))
        num_slabs = max(1, capacity_bytes // slab_bytes)
        slots_per_slab = min(_MAX_SLOTS_PER_SLAB, slab_bytes // _MIN_SLOT_BYTES)
        # Two cells a slot, so that of two buckets one is hardly ever full.
        return cls(
            num_slabs=num_slabs,
            slots_per_slab=slots_per_slab,
            num_buckets=max(1, 2 * num_slabs * slots_per_slab // CELLS_PER_BUCKET),
            slab_bytes=slab_bytes,
        )

    @property
    def num_slots(self) -> int:
        """Of the whole arena, most of them unused where slots are larger than the smallest."""
        return self.num_slabs * self.slots_per_slab

    def slot_bytes(self, payload_bytes: int) -> int:
        """The slot size for blocks of that size; 0 where they are larger than a slab."""
        least = max(1, -(-self.slab_bytes // self.slots_per_slab))
        line_bytes = 64 if payload_bytes < 4 * _PAGE_BYTES else _PAGE_BYTES
        slot_bytes = max(least, -(-payload_bytes // line_bytes) * line_bytes)
        return slot_bytes if slot_bytes <= self.slab_bytes else 0


class ArenaError(Exception):
    """The file is no arena of this version: foreign, damaged or cut off."""


class Arena:
    """One mapping. Columns are views of shared memory: plain reads and writes, ordered only as `arena_store.py` says."""

    def __init__(self, path: Path) -> None:
        """Maps an arena that is there. Raises ArenaError, and OSError where the file cannot be opened or mapped."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.geometry = _read_header(os.pread(descriptor, _HEADER.size + _HEADER_SUM.size, 0))
            offsets, self.data_offset, total_bytes = _layout(self.geometry)
            if os.fstat(descriptor).st_size != total_bytes:
                raise ArenaError(f"has {os.fstat(descriptor).st_size} bytes, not {total_bytes}")
            self._map = mmap.mmap(descriptor, total_bytes)
            self._descriptor = descriptor
        except BaseException:
            os.close(descriptor)
            raise
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self.address = self.bytes.ctypes.data
        self._populated = np.zeros(self.geometry.num_slabs, np.bool_)
        self._seen_states = b""
        slots, slabs = self.geometry.num_slots, self.geometry.num_slabs

        def column(name: str, kind: "type[Scalar] | np.dtype[Scalar]", count: int) -> "npt.NDArray[Scalar]":
            size_bytes = count * _COLUMNS[name][0].itemsize
            found: npt.NDArray[Scalar] = self.bytes[offsets[name] : offsets[name] + size_bytes].view(kind)
            return found

        # One of each per slot. Times are milliseconds of CLOCK_MONOTONIC, modulo 2**32.
        self.state = column("state", np.uint8, slots)
        self.owner = column("owner", np.uint16, slots)
        self.generation = column("generation", np.uint32, slots)
        self.last_use_ms = column("last_use_ms", np.uint32, slots)
        self.inserted_ms = column("inserted_ms", np.uint32, slots)
        self.leased_until_ms = column("leased_until_ms", np.uint32, slots)
        self.uses = column("uses", np.uint16, slots)
        self.records = column("records", RECORD, slots)
        # One per slab.
        self.slab_state = column("slab_state", np.uint8, slabs)
        self.slab_owner = column("slab_owner", np.uint16, slabs)
        self.slab_slot_bytes = column("slab_slot_bytes", np.uint32, slabs)
        # The index: per cell 32 bits of the key, always odd, and the slot; 0 is empty.
        num_buckets = self.geometry.num_buckets
        self.cells = column("cells", np.uint64, num_buckets * CELLS_PER_BUCKET).reshape(num_buckets, CELLS_PER_BUCKET)

    @staticmethod
    def create(path: Path, capacity_bytes: int) -> None:
        """Makes an empty one under that name, replacing what is there. Raises ConfigError where there is no room for its table."""
        geometry = Geometry.of_capacity(capacity_bytes)
        _, data_offset, total_bytes = _layout(geometry)
        head = _HEADER.pack(_MAGIC, _VERSION, geometry.num_slabs, geometry.slots_per_slab, geometry.num_buckets, geometry.slab_bytes)
        unnamed = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, total_bytes)
            # The table has its memory now: a page that shared memory cannot give would end the process that touches it.
            os.posix_fallocate(descriptor, 0, data_offset)
            os.pwrite(descriptor, head + _HEADER_SUM.pack(xxhash.xxh3_64_intdigest(head)), 0)
            os.rename(unnamed, path)
        except OSError as error:
            unnamed.unlink(missing_ok=True)
            raise ConfigError(f"no room for the KV arena in {path.parent} ({error.strerror})", reason=Reason.NO_ROOM) from error
        finally:
            os.close(descriptor)

    def slot_start(self, slot: int, slot_bytes: int, payload_bytes: int) -> int | None:
        """Where a slot's bytes start in the mapping; None where its slab has no slots of that size, or the payload does not fit."""
        slab, number = divmod(slot, self.geometry.slots_per_slab)
        in_slab = number * slot_bytes
        if payload_bytes > slot_bytes or in_slab + payload_bytes > self.geometry.slab_bytes or self.slab_slot_bytes[slab] != slot_bytes:
            return None
        return self.data_offset + slab * self.geometry.slab_bytes + in_slab

    def slot_views(self, slots: npt.NDArray[np.int32], slot_bytes: int, payload_bytes: int) -> list[memoryview]:
        """The bytes of the leading slots whose slabs have slots of that size; about 0.5 us a slot."""
        slabs = slots // self.geometry.slots_per_slab
        in_slab = (slots - slabs * self.geometry.slots_per_slab).astype(np.int64) * slot_bytes
        is_good = (self.slab_slot_bytes[slabs] == slot_bytes) & (in_slab + payload_bytes <= self.geometry.slab_bytes)
        count = len(slots) if is_good.all() else int(is_good.argmin())
        starts = self.data_offset + slabs[:count].astype(np.int64) * self.geometry.slab_bytes + in_slab[:count]
        whole = self.bytes.data
        return [whole[start : start + payload_bytes] for start in starts.tolist()]

    def back(self, slab: int) -> None:
        """Gives a slab its memory, page by page now: fresh pages cost ten times a copy. Raises OSError where there is none."""
        start = self.data_offset + slab * self.geometry.slab_bytes
        os.posix_fallocate(self._descriptor, start, self.geometry.slab_bytes)
        self.populate(slab)

    def populate(self, slab: int) -> None:
        """Enters a slab's pages into this process's tables, once; the slab must have memory. About 1 ms for 16 MiB that are there."""
        if self._populated[slab]:
            return
        self._populated[slab] = True
        start = self.data_offset + slab * self.geometry.slab_bytes
        # What it saves is time, so an old kernel's refusal is no error.
        _madvise(self.address + start, self.geometry.slab_bytes, _POPULATE_WRITE)

    def populate_backed(self) -> None:
        """The same for all slabs that have memory by now; about 0.5 us where nothing is new."""
        states = self.slab_state.tobytes()
        if states == self._seen_states:
            return
        self._seen_states = states
        for slab in np.flatnonzero((self.slab_state == SlabState.BACKED) & ~self._populated).tolist():
            self.populate(slab)

    def key_at(self, slot: int) -> bytes:
        """The key in a slot's record, whatever its state."""
        return bytes(self.records["key"][slot])

    def close(self) -> None:
        """Closes the file; the mapping goes with its last view."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def record_sums(records: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The check sum of each record's fields, as `record_sum` in native.c."""
    words = np.ascontiguousarray(records).view("<u8").reshape(len(records), RECORD.itemsize // 8)
    sums = np.zeros(len(records), np.uint64)
    for word in range(_SUMMED_WORDS):
        sums = (sums ^ words[:, word]) * np.uint64(0xBF58476D1CE4E5B9)
        sums ^= sums >> np.uint64(31)
    return sums


_COLUMNS: dict[str, tuple["np.dtype[np.generic]", str]] = {
    "state": (np.dtype("u1"), "slot"),
    "owner": (np.dtype("<u2"), "slot"),
    "uses": (np.dtype("<u2"), "slot"),
    "generation": (np.dtype("<u4"), "slot"),
    "last_use_ms": (np.dtype("<u4"), "slot"),
    "inserted_ms": (np.dtype("<u4"), "slot"),
    "leased_until_ms": (np.dtype("<u4"), "slot"),
    "records": (RECORD, "slot"),
    "slab_state": (np.dtype("u1"), "slab"),
    "slab_owner": (np.dtype("<u2"), "slab"),
    "slab_slot_bytes": (np.dtype("<u4"), "slab"),
    "cells": (np.dtype("<u8"), "cell"),
}


def _layout(geometry: Geometry) -> tuple[dict[str, int], int, int]:
    """Offset of each column, of the data, and the file's size. Columns start at pages of their own."""
    counts = {"slot": geometry.num_slots, "slab": geometry.num_slabs, "cell": geometry.num_buckets * CELLS_PER_BUCKET}
    offsets: dict[str, int] = {}
    at = _PAGE_BYTES
    for name, (kind, per) in _COLUMNS.items():
        offsets[name] = at
        at += -(-counts[per] * kind.itemsize // _PAGE_BYTES) * _PAGE_BYTES
    data_offset = -(-at // geometry.slab_bytes) * geometry.slab_bytes if geometry.slab_bytes >= 1 << 21 else at
    return offsets, data_offset, data_offset + geometry.num_slabs * geometry.slab_bytes


def _read_header(header: bytes) -> Geometry:
    if len(header) < _HEADER.size + _HEADER_SUM.size or header[:8] != _MAGIC:
        raise ArenaError("is no arena")
    head = header[: _HEADER.size]
    _, version, num_slabs, slots_per_slab, num_buckets, slab_bytes = _HEADER.unpack(head)
    if version != _VERSION:
        raise ArenaError(f"is of version {version}, not {_VERSION}")
    if _HEADER_SUM.unpack(header[_HEADER.size :])[0] != xxhash.xxh3_64_intdigest(head):
        raise ArenaError("has a damaged header")
    return Geometry(num_slabs=num_slabs, slots_per_slab=slots_per_slab, num_buckets=num_buckets, slab_bytes=slab_bytes)


def _madvise(address: int, length: int, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise(address, length, advice)
