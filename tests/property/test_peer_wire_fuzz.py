"""Whatever bytes come from another store are a valid value or a ProtocolError, and what was said is what is read."""

import struct
from itertools import pairwise

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.peer_wire import (
    FRAME_BYTES,
    MAX_BLOCKS_PER_FRAME,
    MAX_BLOCKS_PER_REQUEST,
    REQUEST_BYTES,
    Entry,
    FrameKind,
    RequestKind,
    hash_bytes,
    pack_frame,
    pack_request,
    read_frame,
    read_hashes,
    read_request_head,
    rest_bytes,
)
from tandem.domain import BlockHash, Namespace
from tandem.errors import ProtocolError

BLOCKS = 1000
MAX_PAYLOAD_BYTES = 1 << 20

namespaces = st.binary(min_size=16, max_size=16).map(lambda raw: Namespace(raw.hex()))
hash_lists = st.lists(st.binary(min_size=32, max_size=32).map(BlockHash), min_size=1, max_size=20)
checksums = st.integers(0, 2**64 - 1)
entry_lists = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, MAX_PAYLOAD_BYTES), checksums), max_size=20, unique_by=lambda entry: entry[0]
).map(lambda entries: [Entry(*entry) for entry in sorted(entries)])
any_entries = st.lists(st.builds(Entry, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), checksums), max_size=20)


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes changed, a part left out, or something in between."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        end = draw(st.integers(at, min(len(raw), at + 8)))
        raw[at:end] = draw(st.binary(max_size=8))
    return bytes(raw)


def read_stream(raw: bytes, *, first_place: int = 0) -> tuple[FrameKind, list[Entry]] | None:
    """The first frame of a stream, as a receiver reads it: None where the stream ends before the frame does."""
    if len(raw) < FRAME_BYTES:
        return None
    size = rest_bytes(raw[:FRAME_BYTES])
    assert 0 < size <= MAX_BLOCKS_PER_FRAME * 16 + 8
    rest = raw[FRAME_BYTES : FRAME_BYTES + size]
    if len(rest) < size:
        return None
    return read_frame(raw[:FRAME_BYTES], rest, first_place=first_place, blocks=BLOCKS, max_payload_bytes=MAX_PAYLOAD_BYTES)


def check_frame(raw: bytes, *, first_place: int = 0) -> None:
    """A frame that is read is one that could be obeyed."""
    try:
        frame = read_stream(raw, first_place=first_place)
    except ProtocolError:
        return
    if frame is None:
        return
    kind, entries = frame
    assert (kind is FrameKind.BLOCKS) == bool(entries)
    places = [first_place - 1, *(entry.place for entry in entries), BLOCKS]
    assert all(before < after for before, after in pairwise(places))
    assert all(0 < entry.payload_bytes <= MAX_PAYLOAD_BYTES for entry in entries)


def check_head(raw: bytes) -> None:
    """A request that is read has a bounded number of names."""
    try:
        head = read_request_head(raw)
    except ProtocolError:
        return
    assert head.kind in RequestKind
    assert 0 < hash_bytes(head) <= 32 * MAX_BLOCKS_PER_REQUEST
    assert bytes.fromhex(head.namespace) == raw[-16:]


@given(st.sampled_from(RequestKind), namespaces, hash_lists, st.integers(0, 2**32 - 1))
def test_a_request_is_read_as_it_was_said(kind: RequestKind, namespace: Namespace, hashes: list[BlockHash], wait_ms: int) -> None:
    raw = pack_request(kind, namespace, hashes, wait_ms / 1000)
    head = read_request_head(raw[:REQUEST_BYTES])
    assert (head.kind, head.namespace, head.blocks) == (kind, namespace, len(hashes))
    assert abs(head.wait_ms - wait_ms) <= 1
    assert read_hashes(raw[REQUEST_BYTES:]) == hashes


@given(entry_lists)
def test_a_frame_is_read_as_it_was_said(entries: list[Entry]) -> None:
    kind = FrameKind.BLOCKS if entries else FrameKind.END
    assert read_stream(pack_frame(kind, entries)) == (kind, entries)


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    check_head(raw)
    check_head(b"TKV1" + raw[4:])


@given(st.binary(max_size=400), st.integers(0, BLOCKS))
def test_any_bytes_are_a_frame_or_refused(raw: bytes, first_place: int) -> None:
    check_frame(raw, first_place=first_place)
    check_frame(b"TKV1" + raw, first_place=first_place)


@given(st.data(), namespaces, hash_lists)
def test_a_damaged_request_is_a_request_or_refused(data: st.DataObject, namespace: Namespace, hashes: list[BlockHash]) -> None:
    raw = data.draw(mutated(pack_request(RequestKind.FETCH, namespace, hashes)))
    check_head((raw + bytes(REQUEST_BYTES))[:REQUEST_BYTES])


@given(st.data(), entry_lists, st.integers(0, BLOCKS))
def test_a_damaged_frame_is_a_frame_or_refused(data: st.DataObject, entries: list[Entry], first_place: int) -> None:
    check_frame(data.draw(mutated(pack_frame(FrameKind.BLOCKS, entries))), first_place=first_place)


@given(st.integers(0, 2**16 - 1), any_entries, st.integers(0, BLOCKS))
def test_a_lie_with_a_right_checksum_is_a_frame_or_refused(kind: int, entries: list[Entry], first_place: int) -> None:
    body = struct.pack("<4sHH", b"TKV1", kind, len(entries))
    body += b"".join(struct.pack("<IIQ", entry.place, entry.payload_bytes, entry.checksum) for entry in entries)
    check_frame(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)), first_place=first_place)
