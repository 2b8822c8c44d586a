"""A block store in one dictionary: the model that real stores are compared with, and what pure code is tested against."""

import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence

import numpy as np

from kv_transfer.blocks import BlockKey, block_hashes, make_namespace
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome, StoreStats
from tandem.domain import BlockHash, Namespace

NAMESPACE = make_namespace({"model": "test"})
_LOW_WATERMARK_FRACTION = 15 / 16


def block_hash(number: int) -> BlockHash:
    """One of many hashes: spread as real ones are, since stores index by their bits."""
    return BlockHash(hashlib.sha256(number.to_bytes(32, "big")).digest())


def key(number: int) -> BlockKey:
    """One of many keys of the test namespace."""
    return BlockKey(NAMESPACE, block_hash(number))


def chain(blocks: int, first_token: int = 0, block_size_tokens: int = 4) -> list[BlockHash]:
    """The hashes of a prompt of so many full blocks."""
    return block_hashes(range(first_token, first_token + blocks * block_size_tokens), block_size_tokens)


class DictStore:
    """`BlockStore` in memory. `blocks` (header and payload), `used_s` (time of last use), `leased_until_s` are open to tests."""

    def __init__(self, held: Iterable[BlockKey] = (), *, capacity_bytes: int = 1 << 40) -> None:
        self.blocks: dict[BlockKey, bytes] = dict.fromkeys(held, b"")
        self.used_s: dict[BlockKey, float] = dict.fromkeys(self.blocks, 0.0)
        self.leased_until_s: dict[BlockKey, float] = {}
        self._capacity_bytes = capacity_bytes
        self._clock = itertools.count(1)

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        wanted = [BlockKey(namespace, one) for one in hashes]
        if lease_s > 0.0:
            self.leased_until_s.update({one: time.monotonic() + lease_s for one in wanted if one in self.blocks})
        return [one in self.blocks for one in wanted]

    def note_use(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> None:
        return

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        return [self._put(BlockKey(namespace, one), row.tobytes()) for one, row in zip(hashes, rows, strict=True)]

    def _put(self, wanted: BlockKey, payload: bytes) -> PutOutcome:
        if wanted in self.blocks:
            return PutOutcome.EXISTS
        stored_bytes = HEADER_BYTES + len(payload)
        if stored_bytes > self._capacity_bytes:
            return PutOutcome.NO_ROOM
        self._evict_to(self._capacity_bytes - stored_bytes)
        if self.stats().used_bytes + stored_bytes > self._capacity_bytes:
            return PutOutcome.NO_ROOM
        self.blocks[wanted] = pack_header(wanted, memoryview(payload)) + payload
        self.used_s[wanted] = next(self._clock)
        return PutOutcome.STORED

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        return [self._get(BlockKey(namespace, one), row) for one, row in zip(hashes, rows, strict=True)]

    def _get(self, wanted: BlockKey, row: Bytes) -> BlockOutcome:
        stored = self.blocks.get(wanted)
        if stored is None:
            return BlockOutcome.MISSING
        header, payload = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
        if not is_intact(wanted, header, payload):
            self._remove(wanted)
            return BlockOutcome.CORRUPT
        if len(payload) != len(row):
            return BlockOutcome.MISSING
        row[:] = np.frombuffer(payload, np.uint8)
        self.used_s[wanted] = next(self._clock)
        return BlockOutcome.HIT

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        stored = self.blocks.get(BlockKey(namespace, block_hash))
        return None if stored is None else max(0, len(stored) - HEADER_BYTES)

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        return sum(self._remove(BlockKey(namespace, one)) for one in hashes)

    def _remove(self, wanted: BlockKey) -> bool:
        self.leased_until_s.pop(wanted, None)
        self.used_s.pop(wanted, None)
        return self.blocks.pop(wanted, None) is not None

    def make_room(self) -> int:
        return self._evict_to(_LOW_WATERMARK_FRACTION * self._capacity_bytes)

    def _evict_to(self, limit_bytes: float) -> int:
        now_s, dropped = time.monotonic(), 0
        for oldest in sorted(list(self.blocks), key=lambda block: self.used_s.get(block, 0.0)):
            if self.stats().used_bytes <= limit_bytes:
                break
            if self.leased_until_s.get(oldest, 0.0) <= now_s:
                dropped += self._remove(oldest)
        return dropped

    def stats(self) -> StoreStats:
        used_bytes = sum(map(len, self.blocks.values()))
        return StoreStats(used_bytes=used_bytes, capacity_bytes=self._capacity_bytes, blocks=len(self.blocks))

    def close(self) -> None:
        return
