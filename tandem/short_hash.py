"""The short form of block hashes in which caches are told about and indexed: the first 8 of a hash's 32 bytes.

Must not address bytes: a block is loaded by its whole hash. Two different blocks with one short hash make a router expect a cached
block that is none, which costs a recompute that was not predicted and never a wrong token. In an index of 10**6 blocks the
probability is 10**6 / 2**64 = 5e-14 for each block that is looked up: at 10**6 look-ups a second, one in 200 days.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tandem.domain import BlockHash

SHORT_BYTES = 8
_HASH_BYTES = 32
ShortHashes = npt.NDArray[np.uint64]


def short_hashes(hashes: Sequence[BlockHash]) -> ShortHashes:
    """Of each hash in its order, (n,); about 15 ns each. A hash that is not 32 bytes long counts as padded with zeros."""
    joined = b"".join(hashes)
    if len(joined) != _HASH_BYTES * len(hashes):
        return from_bytes(b"".join(block_hash[:SHORT_BYTES].ljust(SHORT_BYTES, b"\0") for block_hash in hashes))
    return np.frombuffer(joined, "<u8")[:: _HASH_BYTES // SHORT_BYTES]


def from_bytes(joined: bytes) -> ShortHashes:
    """Of 8 bytes each, little-endian, (n,): a view. A rest of fewer bytes is left out."""
    return np.frombuffer(joined, "<u8", count=len(joined) // SHORT_BYTES)


def split(joined: bytes) -> Iterator[bytes]:
    """The 8 bytes of each."""
    for start in range(0, len(joined), SHORT_BYTES):
        yield joined[start : start + SHORT_BYTES]
