"""The bytes of one stored block: a self-describing header with a checksum, then the payload.

The payload is in logical order [layer, kv_head, token, k|v channel]; a block is only ever loaded by an engine of the same namespace.
"""

import struct

import xxhash

from kv_transfer.blocks import BlockKey

_MAGIC = b"TKV1"
# magic, header bytes, namespace (16), block hash (32), payload bytes, payload checksum (XXH3-64)
_HEADER = struct.Struct("<4sI16s32sQQ")
_HEADER_SUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _HEADER_SUM.size


def pack_header(key: BlockKey, payload: memoryview | bytes) -> bytes:
    """The header of `payload` under `key`, HEADER_BYTES long."""
    head = _HEADER.pack(_MAGIC, HEADER_BYTES, bytes.fromhex(key.namespace), key.block_hash, len(payload), xxhash.xxh3_64_intdigest(payload))
    return head + _HEADER_SUM.pack(xxhash.xxh3_64_intdigest(head))


def is_intact(key: BlockKey, header: bytes, payload: memoryview | bytes) -> bool:
    """Whether header and payload are whole and are the block that `key` names."""
    if len(header) != HEADER_BYTES:
        return False
    head = header[: _HEADER.size]
    if _HEADER_SUM.unpack(header[_HEADER.size :])[0] != xxhash.xxh3_64_intdigest(head):
        return False
    magic, header_bytes, namespace, block_hash, payload_bytes, checksum = _HEADER.unpack(head)
    return bool(
        magic == _MAGIC
        and header_bytes == HEADER_BYTES
        and namespace == bytes.fromhex(key.namespace)
        and block_hash == key.block_hash
        and payload_bytes == len(payload)
        and checksum == xxhash.xxh3_64_intdigest(payload)
    )
