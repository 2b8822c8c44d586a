"""Block hashes as caches tell of them."""

import hashlib

import numpy as np

from tandem.domain import BlockHash
from tandem.short_hash import from_bytes, short_hashes, split


def test_a_short_hash_is_the_first_8_bytes_whatever_way_it_came() -> None:
    hashes = [BlockHash(hashlib.sha256(bytes([number])).digest()) for number in range(5)]
    joined = b"".join(block_hash[:8] for block_hash in hashes)
    assert np.array_equal(short_hashes(hashes), from_bytes(joined))
    assert list(split(joined)) == [block_hash[:8] for block_hash in hashes]


def test_a_rest_of_fewer_than_8_bytes_is_left_out() -> None:
    assert len(from_bytes(b"123456789")) == 1
    assert len(from_bytes(b"")) == len(short_hashes([])) == 0
