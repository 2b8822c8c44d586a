"""The store's inner loops in C (`native.c`), called through ctypes: one pass that copies and checks, without Python's lock.

Rows that are no multiple of 64 bytes go the numpy way.
"""

import ctypes
import platform

import numpy as np
import numpy.typing as npt

from kv_transfer.arena import Arena, Bytes
from kv_transfer.copies import BlockIds, BlockRows, Copies, Outcomes, Read, Slots, Sums
from kv_transfer.numpy_copies import NumpyCopies
from tandem.compiled import try_load
from tandem.errors import ConfigError

_ABI = 3
_STRIPE_BYTES = 64
_LEAST_BYTES = 241  # shorter ones are checksummed by another recipe


def open_copies(arena: Arena, *, checksum: bool, native: bool = True) -> Copies:
    """The best there is here. Raises ConfigError where nothing keeps stores in order: neither C nor an x86 processor."""
    library = load_library() if native else None
    if library is not None:
        return NativeCopies(arena, library, checksum=checksum)
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ConfigError(
            "KV transfer needs its native part on this processor: install a C compiler and set up again, or use --no-kv-transfer"
        )
    return NumpyCopies(arena, checksum=checksum)


def load_library() -> ctypes.CDLL | None:
    """The compiled part with its signatures; None where there is none for us."""
    library = try_load("kv_transfer.native", "tandem_kv_abi", _ABI)
    if library is None:
        return None
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.tandem_kv_gather.restype = ctypes.c_uint64
    return library


_Start = ctypes.c_char * 0


class _NativeArena(ctypes.Structure):
    """Mirrors `arena_t` in native.c."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("data_offset", ctypes.c_uint64),
        ("slab_bytes", ctypes.c_uint64),
        ("num_slots", ctypes.c_uint32),
        ("slots_per_slab", ctypes.c_uint32),
        ("num_buckets", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("state", ctypes.c_void_p),
        ("generation", ctypes.c_void_p),
        ("last_use_ms", ctypes.c_void_p),
        ("inserted_ms", ctypes.c_void_p),
        ("leased_until_ms", ctypes.c_void_p),
        ("uses", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("slab_slot_bytes", ctypes.c_void_p),
        ("records", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
    )


class _Layout(ctypes.Structure):
    """Mirrors `layout_t` in native.c."""

    _fields_ = (
        ("pointers", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("row_bytes", ctypes.c_void_p),
        ("num_layers", ctypes.c_uint64),
    )


_AT, _LONG, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "tandem_kv_gather": (_AT, _AT, _LONG, _AT, _AT, _LONG, _INT, _AT, _INT),
    "tandem_kv_scatter": (_AT, _AT, _AT, _AT, _LONG, _INT, _INT, ctypes.c_uint32, _AT, _AT, _AT, _INT),
    "tandem_kv_lookup": (_AT, _AT, _LONG, _AT),
    "tandem_kv_commit": (_AT, _AT, _AT, _AT, _LONG, _LONG, _LONG, _LONG, ctypes.c_uint16, ctypes.c_uint32, _AT),
    "tandem_kv_index": (_AT, _AT, _LONG, _AT),
    "tandem_kv_remove": (_AT, _AT, _LONG),
    "tandem_kv_fence": (),
}


class NativeCopies:
    """By native.c. Rows that are no multiple of 64 bytes go the numpy way."""

    is_native = True

    def __init__(self, arena: Arena, library: ctypes.CDLL, *, checksum: bool, isa: int = 0) -> None:
        self._library = library
        self._arena = arena  # keeps the mapping
        self._checksum = checksum
        self._isa = isa
        self._odd = NumpyCopies(arena, checksum=checksum)
        columns = [name for name, kind in _NativeArena._fields_ if kind is ctypes.c_void_p and name != "base"]
        self._native = _NativeArena(
            base=arena.address,
            data_offset=arena.data_offset,
            slab_bytes=arena.geometry.slab_bytes,
            num_slots=arena.geometry.num_slots,
            slots_per_slab=arena.geometry.slots_per_slab,
            num_buckets=arena.geometry.num_buckets,
            **{name: address(getattr(arena, name)) for name in columns},
        )
        self._pointer = ctypes.byref(self._native)
        self._kept: tuple[BlockRows, _Layout] | None = None

    def _layout(self, rows: BlockRows) -> _Layout | None:
        """Addresses of the rows, None where they are to go the numpy way; kept for an engine's, which are asked for at every step."""
        kept = self._kept
        if kept is not None and kept[0] is rows:
            return kept[1]
        if not _is_even(rows):
            return None
        views = rows.views
        places = [*(address(view) for view in views), *(view.strides[0] for view in views), *(view.shape[1] for view in views)]
        table = (ctypes.c_uint64 * len(places))(*places)
        start, column = ctypes.addressof(table), 8 * len(views)
        layout = _Layout(start, start + column, start + 2 * column, len(views))
        layout.table = table  # which it points into
        if len(rows.views) > 1:
            self._kept = (rows, layout)
        return layout

    def gather(self, slots: Slots, slot_bytes: int, rows: BlockRows, block_ids: BlockIds) -> Sums:
        """Copies block i into slot i of this process; the checksums (0 where they are off). Shorter where a slot is not of that size."""
        layout = self._layout(rows)
        if layout is None:
            return self._odd.gather(slots, slot_bytes, rows, block_ids)
        count, sums = len(slots), np.empty(len(slots), np.uint64)
        copied = self._library.tandem_kv_gather(
            self._pointer,
            _start(slots),
            slot_bytes,
            ctypes.byref(layout),
            _start(block_ids),
            count,
            self._checksum,
            _start(sums),
            self._isa,
        )
        return sums[:copied]

    def scatter(self, keys: Bytes, rows: BlockRows, block_ids: BlockIds, now_ms: int, *, only_leading: bool) -> Read:
        """Copies the block of key i to block id i, checks generation and checksum after it. What is no HIT may be written in part."""
        layout = self._layout(rows)
        if layout is None:
            return self._odd.scatter(keys, rows, block_ids, now_ms, only_leading=only_leading)
        count = len(keys)
        read = Read(outcomes=np.empty(count, np.uint8), slots=np.full(count, -1, np.int32), generations=np.zeros(count, np.uint32))
        self._library.tandem_kv_scatter(
            self._pointer,
            _start(keys),
            ctypes.byref(layout),
            _start(block_ids),
            count,
            self._checksum,
            only_leading,
            now_ms,
            _start(read.outcomes),
            _start(read.slots),
            _start(read.generations),
            self._isa,
        )
        return read

    def lookup(self, keys: Bytes) -> Slots:
        """Committed slot of each key (n, 48), or -1."""
        slots = np.empty(len(keys), np.int32)
        self._library.tandem_kv_lookup(self._pointer, _start(keys), len(keys), _start(slots))
        return slots

    def commit(
        self, slots: Slots, keys: Bytes, sums: Sums, payload_bytes: int, first_position: int, tenant: int, writer: int, now_ms: int
    ) -> Outcomes:
        """Writes the records of filled slots and makes them visible."""
        outcomes = np.empty(len(slots), np.uint8)
        self._library.tandem_kv_commit(
            self._pointer,
            _start(slots),
            _start(keys),
            _start(sums),
            len(slots),
            payload_bytes,
            first_position,
            tenant,
            writer,
            now_ms,
            _start(outcomes),
        )
        return outcomes

    def index(self, slots: Slots) -> Outcomes:
        """Enters slots with records into the index."""
        outcomes = np.empty(len(slots), np.uint8)
        self._library.tandem_kv_index(self._pointer, _start(slots), len(slots), _start(outcomes))
        return outcomes

    def remove(self, slots: Slots) -> None:
        """Takes slots out of the index by the keys in their records."""
        self._library.tandem_kv_remove(self._pointer, _start(slots), len(slots))

    def fence(self) -> None:
        """What was stored before is seen before what is stored after."""
        self._library.tandem_kv_fence()


def _start(array: "npt.NDArray[np.generic]") -> "ctypes.Array[ctypes.c_char]":
    """A contiguous, writable array as an argument: six times as quick as its address, and there are ten in a put."""
    return _Start.from_buffer(array.data)


def address(array: "npt.NDArray[np.generic]") -> int:
    """Of an array's first byte."""
    return array.ctypes.data


def _is_even(rows: BlockRows) -> bool:
    if len(rows.views) == 1:
        row_bytes: int = rows.views[0].shape[1]
        return row_bytes >= _LEAST_BYTES and row_bytes % _STRIPE_BYTES == 0
    return rows.payload_bytes >= _LEAST_BYTES and all(view.shape[1] % _STRIPE_BYTES == 0 for view in rows.views)
