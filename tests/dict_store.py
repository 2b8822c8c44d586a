"""A block store in one dictionary: the model that real stores are compared with, and what pure code is tested against."""

from collections.abc import Iterable, Sequence

from kv_transfer.blocks import BlockKey, block_hashes, make_namespace
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
        self._payload = b""

    def write(self, payload: memoryview) -> None:
        self._payload = bytes(payload)

    def commit(self) -> None:
        self._store.blocks[self._key] = self._payload

    def abort(self) -> None:
        self._payload = b""


class DictStore:
    """`BlockStore` in memory. `blocks` is open to tests; a get of the wrong length is a corrupt block."""

    def __init__(self, held: Iterable[BlockKey] = (), *, capacity_blocks: int = 1_000_000) -> None:
        self.blocks: dict[BlockKey, bytes] = dict.fromkeys(held, b"")
        self.capacity_blocks = capacity_blocks

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [wanted in self.blocks for wanted in keys]

    def try_reserve(self, wanted: BlockKey, payload_bytes: int) -> DictReservation | None:
        return DictReservation(self, wanted) if len(self.blocks) < self.capacity_blocks else None

    def put(self, keys: Sequence[BlockKey], payloads: Sequence[memoryview]) -> list[PutOutcome]:
        outcomes = []
        for wanted, payload in zip(keys, payloads, strict=True):
            reservation = None if wanted in self.blocks else self.try_reserve(wanted, len(payload))
            if reservation is not None:
                reservation.write(payload)
                reservation.commit()
                outcomes.append(PutOutcome.STORED)
            else:
                outcomes.append(PutOutcome.EXISTS if wanted in self.blocks else PutOutcome.NO_ROOM)
        return outcomes

    def get_into(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[BlockOutcome]:
        return [self._get(wanted, buffer) for wanted, buffer in zip(keys, buffers, strict=True)]

    def _get(self, wanted: BlockKey, buffer: memoryview) -> BlockOutcome:
        payload = self.blocks.get(wanted)
        if payload is None:
            return BlockOutcome.MISSING
        if len(payload) != len(buffer):
            self.quarantine(wanted)
            return BlockOutcome.CORRUPT
        buffer[:] = payload
        return BlockOutcome.HIT

    def quarantine(self, bad: BlockKey) -> None:
        self.blocks.pop(bad, None)

    def evict(self) -> int:
        return 0

    def stats(self) -> StoreStats:
        used_bytes = sum(map(len, self.blocks.values()))
        return StoreStats(used_bytes=used_bytes, capacity_bytes=self.capacity_blocks, blocks=len(self.blocks))
