"""What is packed is intact under its own key, and under no other; no flipped bit goes unseen."""

from hypothesis import assume, given
from hypothesis import strategies as st

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from tandem.domain import BlockHash, Namespace

namespaces = st.binary(min_size=16, max_size=16).map(lambda digest: Namespace(digest.hex()))
keys = st.builds(BlockKey, namespaces, st.binary(min_size=32, max_size=32).map(BlockHash))
payloads = st.binary(max_size=300)


@given(keys, payloads)
def test_a_block_is_intact_under_its_key(key: BlockKey, payload: bytes) -> None:
    header = pack_header(key, payload)
    assert len(header) == HEADER_BYTES
    assert is_intact(key, header, payload)


@given(keys, keys, payloads)
def test_a_block_is_not_intact_under_another_key(key: BlockKey, other: BlockKey, payload: bytes) -> None:
    assume(key != other)
    assert not is_intact(other, pack_header(key, payload), payload)


@given(keys, payloads, payloads)
def test_a_header_is_good_for_its_payload_only(key: BlockKey, payload: bytes, other: bytes) -> None:
    assert is_intact(key, pack_header(key, payload), other) == (payload == other)


@given(keys, payloads, st.data())
def test_any_flipped_bit_is_seen(key: BlockKey, payload: bytes, data: st.DataObject) -> None:
    stored = bytearray(pack_header(key, payload) + payload)
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    assert not is_intact(key, bytes(stored[:HEADER_BYTES]), bytes(stored[HEADER_BYTES:]))


@given(keys, st.binary(max_size=200), payloads)
def test_bytes_that_were_never_packed_are_no_block(key: BlockKey, header: bytes, payload: bytes) -> None:
    assert not is_intact(key, header, payload)
