"""Records in a segment file: blocks as `codec` packs them, one after the other. A dropped block's header becomes a tombstone of its size.

Must not verify payloads: that is for whoever reads a block.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from kv_transfer.codec import HEADER_BYTES

# As in codec.py: magic, header bytes, key (namespace and hash), payload bytes, payload checksum, checksum of all these.
_BLOCK_MAGIC, _TOMBSTONE_MAGIC = b"TKV1", b"TKV-"
_KEY, _PAYLOAD_BYTES, _SUM = slice(8, 56), slice(56, 64), slice(HEADER_BYTES - 8, HEADER_BYTES)
_WINDOW_BYTES = 4096  # one page: what a header costs anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a segment; `key` is namespace (16 bytes) and block hash (32)."""

    offset_bytes: int
    key: bytes
    payload_bytes: int
    is_dropped: bool

    @property
    def end_bytes(self) -> int:
        """Where the next one starts."""
        return self.offset_bytes + HEADER_BYTES + self.payload_bytes


def tombstone(key: bytes, payload_bytes: int) -> bytes:
    """What takes the place of a dropped block's header (HEADER_BYTES long), so that the records behind it are still found."""
    parts = (_TOMBSTONE_MAGIC, HEADER_BYTES.to_bytes(4, "little"), key, payload_bytes.to_bytes(8, "little"), bytes(8))
    head = b"".join(parts)
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little")


def scan(descriptor: int, size_bytes: int) -> Iterator[Record]:
    """The records from the start on, up to the first that is not whole. O(records), a read of one page for most; raises OSError."""
    offset = window_start = 0
    window = b""
    while offset + HEADER_BYTES <= size_bytes:
        if offset + HEADER_BYTES > window_start + len(window):
            window, window_start = os.pread(descriptor, _WINDOW_BYTES, offset), offset
        start = offset - window_start
        record = _parse(window[start : start + HEADER_BYTES], offset)
        if record is None or record.end_bytes > size_bytes:
            return
        yield record
        offset = record.end_bytes


def _parse(header: bytes, offset_bytes: int) -> Record | None:
    if len(header) != HEADER_BYTES or header[_SUM] != xxhash.xxh3_64_intdigest(header[: _SUM.start]).to_bytes(8, "little"):
        return None
    magic = header[:4]
    if magic not in (_BLOCK_MAGIC, _TOMBSTONE_MAGIC) or int.from_bytes(header[4:8], "little") != HEADER_BYTES:
        return None
    payload_bytes = int.from_bytes(header[_PAYLOAD_BYTES], "little")
    return Record(offset_bytes=offset_bytes, key=header[_KEY], payload_bytes=payload_bytes, is_dropped=magic == _TOMBSTONE_MAGIC)
