"""A stored block is whole and the one that was asked for, or it is refused."""

import pytest

from kv_transfer.blocks import BlockKey, make_namespace
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from tandem.domain import BlockHash, Namespace
from tests.dict_store import key

KEY = key(7)
PAYLOAD = bytes(range(100))
HEADER = pack_header(KEY, PAYLOAD)


def test_what_was_packed_is_intact() -> None:
    assert len(HEADER) == HEADER_BYTES
    assert is_intact(KEY, HEADER, PAYLOAD)
    assert is_intact(KEY, HEADER, memoryview(bytearray(PAYLOAD)))


def test_an_empty_payload_is_a_block() -> None:
    assert is_intact(KEY, pack_header(KEY, b""), b"")


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_is_seen(mask: int) -> None:
    stored = HEADER + PAYLOAD
    for position in range(len(stored)):
        damaged = bytearray(stored)
        damaged[position] ^= mask
        assert not is_intact(KEY, bytes(damaged[:HEADER_BYTES]), bytes(damaged[HEADER_BYTES:])), position


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_a_truncated_header_is_seen(length: int) -> None:
    assert not is_intact(KEY, HEADER[:length], PAYLOAD)


@pytest.mark.parametrize("payload", [b"", PAYLOAD[:-1], PAYLOAD + b"\0"], ids=["empty", "short", "long"])
def test_a_payload_of_another_length_is_seen(payload: bytes) -> None:
    assert not is_intact(KEY, HEADER, payload)


def test_the_block_of_another_hash_is_seen() -> None:
    assert not is_intact(BlockKey(KEY.namespace, BlockHash(bytes(32))), HEADER, PAYLOAD)


@pytest.mark.parametrize("namespace", [make_namespace({"model": "other"}), "", "ab"])
def test_the_block_of_another_namespace_is_seen(namespace: str) -> None:
    assert not is_intact(BlockKey(Namespace(namespace), KEY.block_hash), HEADER, PAYLOAD)
