"""A node's KV store service: serves the folder's blocks to other nodes, fetches theirs, and keeps the folder within its capacity.

Never waited for inside an engine step: workers of this node read and write the store themselves, and do without where this is dead.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import pack_header
from kv_transfer.copier import BlockCopier, StoreTotals
from kv_transfer.peer_client import MAX_BLOCKS_PER_CALL
from kv_transfer.store import BlockOutcome, BlockStore, leading_count
from tandem.domain import BlockHash, Namespace
from tandem.errors import InvalidRequestError
from tandem.rpc import MAX_MESSAGE_BYTES, ServerCall
from tandem.v1 import store_pb2

logger = logging.getLogger(__name__)

TIER = "shm"
_HOST_PORT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):[0-9]{1,5}")
_HASH_BYTES = 32
_NAMESPACE_BYTES = 16
_MESSAGE_BYTES = 1 << 20  # of block bytes: enough for the cost of a message to vanish, and little to hold
_MAX_BLOCK_BYTES = MAX_MESSAGE_BYTES - (1 << 10)  # a larger one fits no message and counts as not held
_MAX_READS = 16  # calls that are sent blocks at once, each with one message in memory
_MAX_CALL_S = 30.0  # of callers that give no deadline
_KEEP_ROOM_S = 5.0  # looks at every file: about 50 ms of a thread for 1 GiB of 64 KiB blocks
_QUIET_S = 0.05  # after the last copy: workers that wait for its blocks have the processor first


class ServedStore(BlockStore, Protocol):
    """A store that can tell the size of what it holds."""

    def payload_bytes(self, key: BlockKey) -> int | None:
        """Size of a held block; None where it is not held. A hint: get_into checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One message of a Fetch: how many of the keys it answers, its bytes (none where no block is held), what became of each."""

    keys: int
    message: bytes
    served_bytes: int
    outcomes: list[BlockOutcome]


class StoreService:
    """Serves proto service Store over one node's store. `keep_room` runs beside it."""

    def __init__(self, node: str, store: ServedStore, copier: BlockCopier, totals: StoreTotals) -> None:
        self._node = node
        self._store = store
        self._copier = copier
        self._totals = totals
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def stat(self, request: store_pb2.StoreStatRequest, call: ServerCall) -> store_pb2.StoreStatResponse:
        """What the node holds; O(blocks)."""
        stats, totals = await asyncio.to_thread(self._store.stats), self._totals
        tier = store_pb2.TierStat(
            tier=TIER,
            capacity_bytes=stats.capacity_bytes,
            used_bytes=stats.used_bytes,
            blocks=stats.blocks,
            hits_total=totals.served_blocks,
            misses_total=totals.missing_blocks,
            corrupt_total=totals.corrupt_blocks,
            evicted_total=totals.evicted_blocks,
        )
        return store_pb2.StoreStatResponse(node=self._node, tiers=[tier])

    async def lookup(self, request: store_pb2.LookupRequest, call: ServerCall) -> store_pb2.LookupResponse:
        """Which blocks are committed here; a hint."""
        keys = _read_keys(request.namespace, request.block_hashes)
        return store_pb2.LookupResponse(is_held=await asyncio.to_thread(self._store.contains, keys))

    async def fetch(self, request: store_pb2.FetchRequest, call: ServerCall) -> None:
        """Writes the held blocks in order, each checked first; a damaged one is taken out of sight and left out."""
        keys = _read_keys(request.namespace, request.block_hashes)
        async with asyncio.timeout(_time_limit_s(call)), self._reads:
            while keys:
                part = await asyncio.to_thread(self._read, keys)
                keys = keys[part.keys :]
                if part.message:
                    await call.write(part.message)  # waits while the reader is behind
                self._totals.served_blocks += part.outcomes.count(BlockOutcome.HIT)
                self._totals.served_bytes += part.served_bytes
                self._totals.missing_blocks += part.outcomes.count(BlockOutcome.MISSING)
                self._totals.corrupt_blocks += part.outcomes.count(BlockOutcome.CORRUPT)

    def _read(self, keys: Sequence[BlockKey]) -> _Part:
        """The next message, read, checked and serialised in a thread."""
        found: list[tuple[BlockKey, bytearray]] = []
        found_bytes = number = 0
        for number, key in enumerate(keys, 1):
            block_bytes = self._store.payload_bytes(key)
            if block_bytes is None or block_bytes > _MAX_BLOCK_BYTES:
                continue
            if found and found_bytes + block_bytes > _MESSAGE_BYTES:
                number -= 1
                break
            found.append((key, bytearray(block_bytes)))
            found_bytes += block_bytes
        outcomes = self._store.get_into([key for key, _ in found], [memoryview(buffer) for _, buffer in found])
        blocks = [
            store_pb2.StoredBlock(block_hash=key.block_hash, header=pack_header(key, memoryview(buffer)), payload=bytes(buffer))
            for (key, buffer), outcome in zip(found, outcomes, strict=True)
            if outcome is BlockOutcome.HIT
        ]
        return _Part(
            keys=number,
            message=store_pb2.FetchResponse(blocks=blocks).SerializeToString(),
            served_bytes=sum(len(block.payload) for block in blocks),
            outcomes=[*outcomes, *[BlockOutcome.MISSING] * (number - len(found))],
        )

    async def copy(self, request: store_pb2.CopyRequest, call: ServerCall) -> store_pb2.CopyResponse:
        """Fetches what is not here, in order; whole blocks that had come stay where the call fails or ends early."""
        keys = _read_keys(request.namespace, request.block_hashes)
        if not _HOST_PORT.fullmatch(request.from_address):
            raise InvalidRequestError("from_address", "is not HOST:PORT")
        copied_blocks = await self._copier.copy(keys, request.from_address, _time_limit_s(call))
        held_blocks = leading_count(await asyncio.to_thread(self._store.contains, keys))
        return store_pb2.CopyResponse(copied_blocks=copied_blocks, held_blocks=held_blocks)

    async def evict(self, request: store_pb2.EvictRequest, call: ServerCall) -> store_pb2.EvictResponse:
        """Drops the named blocks; without names, what is over the capacity."""
        keys = _read_keys(request.namespace, request.block_hashes) if request.block_hashes else []
        evicted_blocks = await (asyncio.to_thread(self._drop, keys) if keys else asyncio.to_thread(self._store.evict))
        self._totals.evicted_blocks += evicted_blocks
        return store_pb2.EvictResponse(evicted_blocks=evicted_blocks)

    def _drop(self, keys: Sequence[BlockKey]) -> int:
        held_blocks = sum(self._store.contains(keys))
        for key in keys:
            self._store.quarantine(key)
        return held_blocks

    async def keep_room(self) -> None:
        """Evicts every 5 s, and when the copier says so. Workers evict what they write too, should this service be dead."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KEEP_ROOM_S):
                    await self._copier.needs_room.wait()
            self._copier.needs_room.clear()
            try:
                self._totals.evicted_blocks += await asyncio.to_thread(self._store.evict)
            except OSError as error:  # the folder is being removed, or is not ours any more; the next round tries again
                logger.warning("evict_failed error=%r", error)

    async def keep_spares(self) -> None:
        """Once copies have stopped for a moment, makes room for the next ones ahead of time, a block at a time."""
        has_stored = self._copier.has_stored
        while True:
            await has_stored.wait()
            await asyncio.sleep(_QUIET_S)
            has_stored.clear()
            while not has_stored.is_set():
                if not await asyncio.to_thread(self._store.add_spare, self._copier.block_bytes):
                    break


def _read_keys(namespace: str, block_hashes: Sequence[bytes]) -> list[BlockKey]:
    """The keys; they become paths, so nothing else passes. Raises InvalidRequestError."""
    if not re.fullmatch(f"[0-9a-f]{{{2 * _NAMESPACE_BYTES}}}", namespace):
        raise InvalidRequestError("namespace", f"must be {2 * _NAMESPACE_BYTES} lower-case hex digits")
    if len(block_hashes) > MAX_BLOCKS_PER_CALL:
        raise InvalidRequestError("block_hashes", f"at most {MAX_BLOCKS_PER_CALL} a call, got {len(block_hashes)}")
    if any(len(block_hash) != _HASH_BYTES for block_hash in block_hashes):
        raise InvalidRequestError("block_hashes", f"must have {_HASH_BYTES} bytes each")
    return [BlockKey(Namespace(namespace), BlockHash(block_hash)) for block_hash in block_hashes]


def _time_limit_s(call: ServerCall) -> float:
    remaining_s = call.time_remaining_s()
    return _MAX_CALL_S if remaining_s is None else min(_MAX_CALL_S, remaining_s)
