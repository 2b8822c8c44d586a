"""What two store services say to each other over TCP, as bytes: a fetch names blocks, manifests and payloads answer it.

A request: head, then its hashes. The answer is frames in order: BLOCKS (its entries, then the payloads one after another), WAITING
(nothing is there yet), END. Numbers are little-endian; each frame's head and entries are covered by a checksum, each payload by its own.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from tandem.domain import BlockHash, Namespace
from tandem.errors import ProtocolError

MAX_BLOCKS_PER_REQUEST = 16_384  # of a prompt of half a million tokens: half a megabyte of hashes
MAX_BLOCKS_PER_FRAME = 256
_REQUEST = struct.Struct("<4sHxxII16s")  # magic, kind, blocks, milliseconds to wait for what is not there, namespace
_FRAME = struct.Struct("<4sHH")  # magic, kind, entries
_ENTRY = struct.Struct("<IIQ")  # place in the request, payload bytes, payload checksum
_SUM = struct.Struct("<Q")
_MAGIC = b"TKV1"
_HASH_BYTES = 32
REQUEST_BYTES = _REQUEST.size
FRAME_BYTES = _FRAME.size


class RequestKind(IntEnum):
    """FETCH sends blocks; CHECK has the other side check blocks that came damaged, and answers END."""

    FETCH = 1
    CHECK = 2


class FrameKind(IntEnum):
    """BLOCKS follow, none is there yet, or no more will come."""

    BLOCKS = 1
    WAITING = 2
    END = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """What a request asks; its hashes follow."""

    kind: RequestKind
    blocks: int
    wait_ms: int
    namespace: Namespace


@dataclass(frozen=True, slots=True)
class Entry:
    """One block that follows: its place in the request, its bytes, their XXH3-64."""

    place: int
    payload_bytes: int
    checksum: int


def pack_request(kind: RequestKind, namespace: Namespace, hashes: Sequence[BlockHash], wait_s: float = 0.0) -> bytes:
    """A whole request."""
    return _REQUEST.pack(_MAGIC, kind, len(hashes), int(1000 * wait_s), bytes.fromhex(namespace)) + b"".join(hashes)


def read_request_head(head: bytes) -> RequestHead:
    """Out of REQUEST_BYTES bytes. Raises ProtocolError."""
    magic, kind, blocks, wait_ms, namespace = _REQUEST.unpack(head)
    if magic != _MAGIC:
        raise ProtocolError("this is no request between stores")
    if kind not in list(RequestKind) or not 0 < blocks <= MAX_BLOCKS_PER_REQUEST:
        raise ProtocolError(f"a store asks for {blocks} blocks by a request of kind {kind}")
    return RequestHead(kind=RequestKind(kind), blocks=blocks, wait_ms=wait_ms, namespace=Namespace(namespace.hex()))


def hash_bytes(head: RequestHead) -> int:
    """Bytes of hashes that follow."""
    return head.blocks * _HASH_BYTES


def read_hashes(payload: bytes) -> list[BlockHash]:
    """Hashes out of their bytes."""
    return [BlockHash(payload[at : at + _HASH_BYTES]) for at in range(0, len(payload), _HASH_BYTES)]


def pack_frame(kind: FrameKind, entries: Sequence[Entry] = ()) -> bytes:
    """Head, entries and their checksum; payloads come after it."""
    frame = _FRAME.pack(_MAGIC, kind, len(entries))
    frame += b"".join(_ENTRY.pack(entry.place, entry.payload_bytes, entry.checksum) for entry in entries)
    return frame + _SUM.pack(xxhash.xxh3_64_intdigest(frame))


def rest_bytes(head: bytes) -> int:
    """Bytes of entries and checksum after a frame's head. Raises ProtocolError."""
    magic, kind, entries = _FRAME.unpack(head)
    if magic != _MAGIC or kind not in list(FrameKind) or entries > MAX_BLOCKS_PER_FRAME:
        raise ProtocolError("a store answers with garbage")
    return int(entries * _ENTRY.size + _SUM.size)


def read_frame(head: bytes, rest: bytes, *, first_place: int, blocks: int, max_payload_bytes: int) -> tuple[FrameKind, list[Entry]]:
    """Kind and entries: places from `first_place` on, rising, below `blocks`; sizes within reason. Raises ProtocolError."""
    if _SUM.unpack(rest[-_SUM.size :])[0] != xxhash.xxh3_64_intdigest(head + rest[: -_SUM.size]):
        raise ProtocolError("a store's answer is damaged")
    kind = FrameKind(_FRAME.unpack(head)[1])
    entries = [Entry(*_ENTRY.unpack_from(rest, at)) for at in range(0, len(rest) - _SUM.size, _ENTRY.size)]
    if bool(entries) != (kind is FrameKind.BLOCKS):
        raise ProtocolError("a store's answer has blocks where none belong, or none where some do")
    for entry in entries:
        if not first_place <= entry.place < blocks:
            raise ProtocolError("a store sends blocks that were not asked for")
        if not 0 < entry.payload_bytes <= max_payload_bytes:
            raise ProtocolError(f"a store sends a block of {entry.payload_bytes} bytes")
        first_place = entry.place + 1
    return kind, entries
