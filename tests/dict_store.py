"""A block store in one dictionary: the model that real stores are compared with, and what pure code is tested against."""

import itertools
from collections.abc import Iterable, Sequence

from kv_transfer.blocks import BlockKey, block_hashes, make_namespace
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.store import BlockOutcome, PutOutcome, StoreStats
from tandem.domain import BlockHash

NAMESPACE = make_namespace({"model": "test"})


def key(number: int) -> BlockKey:
    """One of many keys of the test namespace."""
    return BlockKey(NAMESPACE, BlockHash(number.to_bytes(32, "big")))


def chain(blocks: int, first_token: int = 0, block_size_tokens: int = 4) -> list[BlockHash]:
    """The hashes of a prompt of so many full blocks."""
    return block_hashes(range(first_token, first_token + blocks * block_size_tokens), block_size_tokens)


class DictReservation:
    """Bytes that become visible at commit."""

    def __init__(self, store: "DictStore", reserved: BlockKey) -> None:
        self._store = store
        self._key = reserved
        self._stored = b""

    def write(self, payload: memoryview) -> None:
        self._stored = pack_header(self._key, payload) + payload

    def commit(self) -> None:
        if self._key not in self._store.blocks:  # the first writer's block stays
            self._store.blocks[self._key] = self._stored
            self._store.use(self._key)

    def abort(self) -> None:
        self._stored = b""


class DictStore:
    """`BlockStore` in memory. `blocks` (header and payload) and `used_s` (time of last use) are open to tests."""

    def __init__(self, held: Iterable[BlockKey] = (), *, capacity_bytes: int = 1 << 40, max_bytes: int = 1 << 40) -> None:
        self.blocks: dict[BlockKey, bytes] = dict.fromkeys(held, b"")
        self.used_s: dict[BlockKey, float] = dict.fromkeys(held, 0.0)
        self._capacity_bytes = capacity_bytes
        self._max_bytes = max_bytes
        self._clock = itertools.count(1)

    def use(self, used: BlockKey) -> None:
        """The block was used now."""
        self.used_s[used] = next(self._clock)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [wanted in self.blocks for wanted in keys]

    def try_reserve(self, key: BlockKey, payload_bytes: int) -> DictReservation | None:
        has_room = self.stats().used_bytes + HEADER_BYTES + payload_bytes <= self._max_bytes
        return DictReservation(self, key) if has_room else None

    def put(self, keys: Sequence[BlockKey], payloads: Sequence[memoryview]) -> list[PutOutcome]:
        return [self._put(wanted, payload) for wanted, payload in zip(keys, payloads, strict=True)]

    def _put(self, wanted: BlockKey, payload: memoryview) -> PutOutcome:
        if wanted in self.blocks:
            return PutOutcome.EXISTS
        reservation = self.try_reserve(wanted, len(payload))
        if reservation is None:
            return PutOutcome.NO_ROOM
        reservation.write(payload)
        reservation.commit()
        return PutOutcome.STORED

    def get_into(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[BlockOutcome]:
        return [self._get(wanted, buffer) for wanted, buffer in zip(keys, buffers, strict=True)]

    def _get(self, wanted: BlockKey, buffer: memoryview) -> BlockOutcome:
        stored = self.blocks.get(wanted)
        if stored is None:
            return BlockOutcome.MISSING
        header, payload = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
        if len(payload) != len(buffer) or not is_intact(wanted, header, payload):
            self.quarantine(wanted)
            return BlockOutcome.CORRUPT
        buffer[:] = payload
        self.use(wanted)
        return BlockOutcome.HIT

    def quarantine(self, key: BlockKey) -> None:
        self.blocks.pop(key, None)

    def add_spare(self, payload_bytes: int) -> bool:
        return False

    def close(self) -> None:
        return

    def evict(self) -> int:
        before = len(self.blocks)
        if self.stats().used_bytes > self._capacity_bytes:
            while self.stats().used_bytes > 0.9 * self._capacity_bytes:
                del self.blocks[min(self.blocks, key=self.used_s.__getitem__)]
        return before - len(self.blocks)

    def stats(self) -> StoreStats:
        used_bytes = sum(map(len, self.blocks.values()))
        return StoreStats(used_bytes=used_bytes, capacity_bytes=self._capacity_bytes, blocks=len(self.blocks))
