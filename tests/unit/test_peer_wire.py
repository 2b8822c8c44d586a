"""What two store services say to each other, byte by byte: every field, and what is refused."""

import struct

import pytest
import xxhash

from kv_transfer import peer_wire
from kv_transfer.peer_wire import (
    FRAME_BYTES,
    MAX_BLOCKS_PER_FRAME,
    MAX_BLOCKS_PER_REQUEST,
    REQUEST_BYTES,
    Entry,
    FrameKind,
    RequestHead,
    RequestKind,
    hash_bytes,
    pack_frame,
    pack_request,
    read_frame,
    read_hashes,
    read_request_head,
    rest_bytes,
)
from tandem.domain import Namespace
from tandem.errors import ProtocolError
from tests.dict_store import NAMESPACE, block_hash

HASHES = [block_hash(number) for number in range(5)]
ENTRIES = [Entry(0, 100, 2**64 - 1), Entry(2, 200, 7), Entry(4, 4096, 0)]


def read(frame: bytes, *, first_place: int = 0, blocks: int = len(HASHES), max_payload_bytes: int = 4096) -> tuple[FrameKind, list[Entry]]:
    """A frame, as its receiver reads it: the head, then as many bytes as it says; what comes after it is another frame's."""
    head = frame[:FRAME_BYTES]
    rest = (frame + bytes(1 << 13))[FRAME_BYTES:][: rest_bytes(head)]
    return read_frame(head, rest, first_place=first_place, blocks=blocks, max_payload_bytes=max_payload_bytes)


def head_of(magic: bytes = b"TKV1", kind: int = 1, blocks: int = 1, wait_ms: int = 0) -> bytes:
    """A request's head, field by field."""
    return struct.pack("<4sHHII16s", magic, kind, 0, blocks, wait_ms, bytes(16))


class TestRequest:
    @pytest.mark.parametrize("kind", RequestKind)
    def test_says_kind_names_and_how_long_to_wait(self, kind: RequestKind) -> None:
        request = pack_request(kind, NAMESPACE, HASHES, wait_s=1.25)
        head = read_request_head(request[:REQUEST_BYTES])
        assert head == RequestHead(kind=kind, blocks=5, wait_ms=1250, namespace=NAMESPACE)
        assert len(request) == REQUEST_BYTES + hash_bytes(head)
        assert read_hashes(request[REQUEST_BYTES:]) == HASHES

    def test_is_laid_out_as_other_versions_read_it(self) -> None:
        request = pack_request(RequestKind.FETCH, Namespace("0123456789abcdef" * 2), HASHES[:1], wait_s=0.5)
        assert request.hex() == "544b563101000000" + "01000000" + "f4010000" + "0123456789abcdef" * 2 + HASHES[0].hex()

    def test_does_not_wait_unless_it_says_so(self) -> None:
        assert read_request_head(pack_request(RequestKind.FETCH, NAMESPACE, HASHES)[:REQUEST_BYTES]).wait_ms == 0

    @pytest.mark.parametrize("blocks", [1, MAX_BLOCKS_PER_REQUEST])
    def test_names_from_one_block_to_the_limit(self, blocks: int) -> None:
        assert read_request_head(head_of(blocks=blocks)).blocks == blocks

    @pytest.mark.parametrize("blocks", [0, MAX_BLOCKS_PER_REQUEST + 1, 2**31, 2**32 - 1])
    def test_of_none_or_too_many_blocks_is_refused(self, blocks: int) -> None:
        with pytest.raises(ProtocolError, match=f"asks for {blocks} blocks"):
            read_request_head(head_of(blocks=blocks))

    @pytest.mark.parametrize("kind", [0, 3, 2**16 - 1])
    def test_of_an_unknown_kind_is_refused(self, kind: int) -> None:
        with pytest.raises(ProtocolError, match=f"of kind {kind}"):
            read_request_head(head_of(kind=kind))

    @pytest.mark.parametrize("magic", [b"TKV2", b"GET ", bytes(4)])
    def test_of_another_protocol_is_refused(self, magic: bytes) -> None:
        with pytest.raises(ProtocolError, match="no request between stores"):
            read_request_head(head_of(magic=magic))


class TestFrame:
    def test_says_place_size_and_checksum_of_each_block(self) -> None:
        assert read(pack_frame(FrameKind.BLOCKS, ENTRIES)) == (FrameKind.BLOCKS, ENTRIES)

    @pytest.mark.parametrize("kind", [FrameKind.WAITING, FrameKind.END])
    def test_without_blocks_is_its_kind_alone(self, kind: FrameKind) -> None:
        assert read(pack_frame(kind)) == (kind, [])

    def test_is_laid_out_as_other_versions_read_it(self) -> None:
        body = bytes.fromhex("544b563101000100" + "02000000" + "c8000000" + "0700000000000000")
        assert pack_frame(FrameKind.BLOCKS, ENTRIES[1:2]) == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))

    def test_holds_as_many_blocks_as_the_limit_says_and_no_more(self) -> None:
        entries = [Entry(place, 1, place) for place in range(MAX_BLOCKS_PER_FRAME)]
        assert read(pack_frame(FrameKind.BLOCKS, entries), blocks=MAX_BLOCKS_PER_FRAME)[1] == entries
        with pytest.raises(ProtocolError, match="garbage"):
            rest_bytes(struct.pack("<4sHH", b"TKV1", FrameKind.BLOCKS, MAX_BLOCKS_PER_FRAME + 1))

    @pytest.mark.parametrize(("magic", "kind"), [(b"HTTP", 1), (b"TKV1", 0), (b"TKV1", 4), (b"TKV1", 2**16 - 1)])
    def test_with_a_head_that_is_none_is_refused(self, magic: bytes, kind: int) -> None:
        with pytest.raises(ProtocolError, match="garbage"):
            rest_bytes(struct.pack("<4sHH", magic, kind, 0))

    @pytest.mark.parametrize("kind", FrameKind)
    def test_with_a_flipped_bit_is_refused(self, kind: FrameKind) -> None:
        frame = pack_frame(kind, ENTRIES if kind is FrameKind.BLOCKS else ())
        for position in range(len(frame)):
            damaged = bytearray(frame)
            damaged[position] ^= 1
            with pytest.raises(ProtocolError):
                read(bytes(damaged))

    @pytest.mark.parametrize(("kind", "entries"), [(FrameKind.BLOCKS, []), (FrameKind.WAITING, ENTRIES), (FrameKind.END, ENTRIES)])
    def test_has_blocks_where_its_kind_says_so_and_only_there(self, kind: FrameKind, entries: list[Entry]) -> None:
        with pytest.raises(ProtocolError, match="blocks where none belong"):
            read(pack_frame(kind, entries))

    @pytest.mark.parametrize(
        "places", [(5,), (2**32 - 1,), (0,), (3, 2), (3, 3)], ids=["past the end", "far past it", "answered before", "backwards", "twice"]
    )
    def test_with_a_block_that_was_not_asked_for_is_refused(self, places: tuple[int, ...]) -> None:
        with pytest.raises(ProtocolError, match="not asked for"):
            read(pack_frame(FrameKind.BLOCKS, [Entry(place, 1, 0) for place in places]), first_place=1)

    @pytest.mark.parametrize("payload_bytes", [0, 4097, 2**32 - 1])
    def test_with_a_block_of_no_size_that_a_store_has_is_refused(self, payload_bytes: int) -> None:
        with pytest.raises(ProtocolError, match=f"a block of {payload_bytes} bytes"):
            read(pack_frame(FrameKind.BLOCKS, [Entry(0, payload_bytes, 0)]))

    def test_answers_to_a_request_for_no_block_hold_none(self) -> None:
        with pytest.raises(ProtocolError):
            read(pack_frame(FrameKind.BLOCKS, [Entry(0, 1, 0)]), blocks=0)


def test_sizes_of_heads_are_those_of_the_wire() -> None:
    assert (REQUEST_BYTES, FRAME_BYTES) == (32, 8)
    assert peer_wire.MAX_BLOCKS_PER_REQUEST == 16_384
