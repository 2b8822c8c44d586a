"""Blocks from other nodes' stores into this node's: each block fetched once at a time, checked, within bounds.

Must not serve: `service.py` does. A block that does not come is a miss, and whatever goes wrong leaves whole blocks only.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import is_intact
from kv_transfer.peer_client import fetching
from kv_transfer.store import BlockStore, PutOutcome
from tandem.channel_pool import ChannelPool
from tandem.domain import BlockHash, Namespace
from tandem.errors import Reason, UnavailableError
from tandem.rpc import parse_answer
from tandem.v1 import store_pb2

# Each holds about one message (1 MiB, or one block): more of them would not be quicker on one link.
_MAX_FETCHES = 8
# A peer that is stopped says nothing; a busy one sends its next megabyte within milliseconds.
_SILENCE_S = 2.0


@dataclass(slots=True, kw_only=True)
class StoreTotals:
    """Cumulative counts of one store service. Changed on its event loop only."""

    fetched_blocks: int = 0
    fetched_bytes: int = 0
    served_blocks: int = 0
    served_bytes: int = 0
    missing_blocks: int = 0  # asked for by another node and not held
    corrupt_blocks: int = 0  # failed their check, here or on the way here
    unstored_blocks: int = 0  # came and found no room
    evicted_blocks: int = 0


class BlockCopier:
    """Fetches into `store`.

    `has_stored` is set with each message that was stored, `needs_room` once enough has come, or found no room, for an eviction to be due.
    """

    def __init__(self, store: BlockStore, channels: ChannelPool, totals: StoreTotals, *, evict_after_bytes: int) -> None:
        self._store = store
        self._channels = channels
        self._totals = totals
        self._evict_after_bytes = evict_after_bytes
        self._unevicted_bytes = 0
        self._coming: dict[BlockKey, asyncio.Event] = {}
        self._slots = asyncio.Semaphore(_MAX_FETCHES)
        self.has_stored = asyncio.Event()
        self.needs_room = asyncio.Event()
        self.block_bytes = 0  # payload of the last block that was stored

    async def copy(self, keys: Sequence[BlockKey], from_address: str, timeout_s: float) -> int:
        """Fetches the blocks that are not here from the service at `from_address`, in order; returns how many came by this call.

        Blocks that another call is fetching are waited for, and fetched by this one where that call fails. Raises TimeoutError, and
        UnavailableError where the other service is gone or silent; what had come by then stays.
        """
        copied = 0
        wanted = list(dict.fromkeys(keys))
        async with asyncio.timeout(timeout_s):
            while wanted:
                coming = [key for key in wanted if key in self._coming]
                if len(coming) < len(wanted):
                    copied += await self._claim([key for key in wanted if key not in self._coming], from_address, timeout_s)
                else:
                    await self._coming[coming[0]].wait()
                wanted = coming
        return copied

    async def _claim(self, keys: list[BlockKey], from_address: str, timeout_s: float) -> int:
        """Fetches those that are not here; whoever waits for any of them is let go on every way out."""
        ended = asyncio.Event()
        self._coming.update(dict.fromkeys(keys, ended))
        try:
            held = await asyncio.to_thread(self._store.contains, keys)
            absent = [key for key, is_held in zip(keys, held, strict=True) if not is_held]
            if not absent:
                return 0
            async with self._slots:
                return await self._receive(absent, from_address, timeout_s)
        finally:
            for key in keys:
                del self._coming[key]
            ended.set()

    async def _receive(self, keys: list[BlockKey], from_address: str, timeout_s: float) -> int:
        stored = 0
        wanted = {key.block_hash for key in keys}
        async with fetching(self._channels(from_address), keys, timeout_s=timeout_s) as stream:
            while True:
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        payload = await stream.read()
                except TimeoutError as error:
                    raise UnavailableError(f"the store at {from_address} says nothing", reason=Reason.WORKER_LOST) from error
                if payload is None:
                    return stored
                # The next message is asked for when this one is stored: the sender waits at most one window ahead.
                stored += self._count(await asyncio.to_thread(self._put, payload, keys[0].namespace, wanted))

    def _put(self, payload: bytes, namespace: Namespace, wanted: set[BlockHash]) -> list[tuple[int, PutOutcome | None]]:
        """Stores one message's intact blocks, in a thread; each block's bytes and outcome, None where it failed its check."""
        outcomes: list[tuple[int, PutOutcome | None]] = []
        for block in parse_answer(store_pb2.FetchResponse, payload).blocks:
            key = BlockKey(namespace, BlockHash(block.block_hash))
            is_good = key.block_hash in wanted and is_intact(key, block.header, block.payload)
            outcome = self._store.put([key], [memoryview(block.payload)])[0] if is_good else None
            outcomes.append((len(block.payload), outcome))
        return outcomes

    def _count(self, outcomes: list[tuple[int, PutOutcome | None]]) -> int:
        stored = [size_bytes for size_bytes, outcome in outcomes if outcome is PutOutcome.STORED]
        no_room = sum(outcome is PutOutcome.NO_ROOM for _, outcome in outcomes)
        self._totals.fetched_blocks += len(stored)
        self._totals.fetched_bytes += sum(stored)
        self._totals.corrupt_blocks += sum(outcome is None for _, outcome in outcomes)
        self._totals.unstored_blocks += no_room
        self._unevicted_bytes += sum(stored)
        if stored:
            self.block_bytes = stored[-1]
            self.has_stored.set()
        if no_room or self._unevicted_bytes >= self._evict_after_bytes:
            self._unevicted_bytes = 0
            self.needs_room.set()
        return len(stored)
