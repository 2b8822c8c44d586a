"""A node's KV store service: says what the node holds, fetches from other nodes, and keeps room. Blocks go by `peer_server.py`.

Never waited for inside an engine step: workers of this node read and write the store themselves, and do without where this is dead.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence

from kv_transfer.arena_store import ArenaStore
from kv_transfer.arena_watch import ArenaWatch
from kv_transfer.copier import BlockCopier
from kv_transfer.peer_client import MAX_BLOCKS_PER_CALL
from kv_transfer.prefetcher import Prefetcher
from kv_transfer.store import StoreStats, leading_count
from kv_transfer.store_totals import StoreTotals
from kv_transfer.tiered_store import LowerStats, TieredStore
from tandem.convert import block_change_to_pb
from tandem.domain import BlockHash, Namespace
from tandem.errors import InvalidRequestError, OverloadedError
from tandem.rpc import ServerCall
from tandem.v1 import store_pb2

logger = logging.getLogger(__name__)

_HOST_PORT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):[0-9]{1,5}")
_HASH_BYTES = 32
_NAMESPACE_BYTES = 16
_MAX_CALL_S = 30.0  # of callers that give no deadline
_ANSWER_FRACTION = 0.9
_KEEP_ROOM_S = 1.0  # a look at the columns: about 0.3 ms
_MAX_WATCHES = 64  # 13 bytes a slot each
_WATCH_BLOCKS = 4096  # in one message: 32 KiB
_WATCH_S, _WATCH_BEHIND_S = 0.25, 0.02  # between two looks
_WATCH_IDLE_LOOKS = 4  # without news before a message that has none
_KEEP_ROOM_PAUSE_S = 0.05  # after blocks came: their readers have the processor first


class StoreService:
    """Serves proto service Store over one node's store. `keep_room` runs beside it."""

    def __init__(
        self,
        node: str,
        store: ArenaStore,
        tiers: TieredStore,
        copier: BlockCopier,
        prefetcher: Prefetcher,
        totals: StoreTotals,
        *,
        peer_port: int,
        needs_room: asyncio.Event,
    ) -> None:
        self._node = node
        self._tiers = tiers
        self._prefetcher = prefetcher
        self._store = store
        self._copier = copier
        self._totals = totals
        self._peer_port = peer_port
        self._needs_room = needs_room  # set when blocks came
        self._watches = 0
        self._is_ending = False

    async def stat(self, request: store_pb2.StoreStatRequest, call: ServerCall) -> store_pb2.StoreStatResponse:
        """What the node holds, tier by tier; O(slots)."""
        census, totals = self._store.upkeep.census(), self._totals
        arena = _tier_stat("arena", self._store.stats())
        arena.hits_total, arena.misses_total = totals.served_blocks, totals.missing_blocks
        arena.error = self._store.room.error
        arena.corrupt_total, arena.evicted_total = totals.corrupt_blocks, totals.evicted_blocks
        lower = await asyncio.to_thread(self._tiers.stats)
        return store_pb2.StoreStatResponse(
            node=self._node,
            tiers=[arena, *(_lower_stat(name, tier) for name, tier in lower.items())],
            peer_port=self._peer_port,
            granted_slots=census.granted_slots,
            leased_blocks=census.leased_blocks,
            leaked_slots=census.leaked_slots,
            is_native=self._store.is_native,
        )

    async def lookup(self, request: store_pb2.LookupRequest, call: ServerCall) -> store_pb2.LookupResponse:
        """Which blocks are committed here; a hint."""
        namespace, hashes = _read_names(request.namespace, request.block_hashes)
        return store_pb2.LookupResponse(is_held=self._store.contains(namespace, hashes))

    async def copy(self, request: store_pb2.CopyRequest, call: ServerCall) -> store_pb2.CopyResponse:
        """Fetches what is not here, in order; whole blocks that had come stay where the call fails or ends early."""
        namespace, hashes = _read_names(request.namespace, request.block_hashes)
        if not _HOST_PORT.fullmatch(request.from_address):
            raise InvalidRequestError("from_address", "is not HOST:PORT")
        copied_blocks = await self._copier.copy(namespace, hashes, request.from_address, _time_limit_s(call), request.wait_ms / 1000)
        held_blocks = leading_count(self._store.contains(namespace, hashes))
        return store_pb2.CopyResponse(copied_blocks=copied_blocks, held_blocks=held_blocks)

    async def prefetch(self, request: store_pb2.PrefetchRequest, call: ServerCall) -> store_pb2.PrefetchResponse:
        """Brings leading blocks into the arena, as far as they are anywhere."""
        namespace, hashes = _read_names(request.namespace, request.block_hashes)
        # A little before the caller's patience ends: what came by then is worth an answer.
        held_blocks = await self._prefetcher.bring(namespace, hashes, _ANSWER_FRACTION * _time_limit_s(call))
        return store_pb2.PrefetchResponse(held_blocks=held_blocks)

    async def evict(self, request: store_pb2.EvictRequest, call: ServerCall) -> store_pb2.EvictResponse:
        """Drops the named blocks; without names, what is over the capacity."""
        if request.block_hashes:
            evicted_blocks = await asyncio.to_thread(self._store.drop, *_read_names(request.namespace, request.block_hashes))
        else:
            evicted_blocks = await asyncio.to_thread(self._store.make_room)
        self._totals.evicted_blocks += evicted_blocks
        return store_pb2.EvictResponse(evicted_blocks=evicted_blocks)

    async def watch(self, request: store_pb2.StoreWatchRequest, call: ServerCall) -> None:
        """Streams what the arena holds, then what changes. Raises OverloadedError."""
        if self._watches >= _MAX_WATCHES:
            raise OverloadedError(f"{_MAX_WATCHES} others watch this store", retry_after_s=_MAX_CALL_S)
        self._watches += 1
        try:
            await self._tell(ArenaWatch(self._store.arena), call)
        finally:
            self._watches -= 1

    async def _tell(self, watch: ArenaWatch, call: ServerCall) -> None:
        idle_looks = _WATCH_IDLE_LOOKS
        while not self._is_ending:
            changes = await asyncio.to_thread(watch.look, _WATCH_BLOCKS)
            idle_looks += 1
            if changes or idle_looks > _WATCH_IDLE_LOOKS:
                idle_looks = 0
                namespaces = [
                    store_pb2.NamespaceEvents(namespace=namespace, block_events=block_change_to_pb(change))
                    for namespace, change in changes.items()
                ]
                await call.write(store_pb2.StoreWatchResponse(node=self._node, namespaces=namespaces))
            await asyncio.sleep(_WATCH_BEHIND_S if watch.is_behind else _WATCH_S)

    def end(self) -> None:
        """Has Watch streams end at their next look: a server waits for them when it stops."""
        self._is_ending = True

    async def keep_room(self) -> None:
        """Makes room every second, and soon after blocks came. Workers do so themselves where this service is dead."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KEEP_ROOM_S):
                    await self._needs_room.wait()
            await asyncio.sleep(_KEEP_ROOM_PAUSE_S)
            self._needs_room.clear()
            self._totals.evicted_blocks += await asyncio.to_thread(self._store.make_room)


def _tier_stat(name: str, stats: StoreStats) -> store_pb2.TierStat:
    return store_pb2.TierStat(tier=name, capacity_bytes=stats.capacity_bytes, used_bytes=stats.used_bytes, blocks=stats.blocks)


def _lower_stat(name: str, tier: LowerStats) -> store_pb2.TierStat:
    stat = _tier_stat(name, tier.stats)
    stat.corrupt_total, stat.promoted_total, stat.demoted_total, stat.error = (
        tier.corrupt_blocks,
        tier.promoted_blocks,
        tier.demoted_blocks,
        tier.error,
    )
    return stat


def _read_names(namespace: str, block_hashes: Sequence[bytes]) -> tuple[Namespace, list[BlockHash]]:
    """Namespace and hashes as they must be. Raises InvalidRequestError."""
    if not re.fullmatch(f"[0-9a-f]{{{2 * _NAMESPACE_BYTES}}}", namespace):
        raise InvalidRequestError("namespace", f"must be {2 * _NAMESPACE_BYTES} lower-case hex digits")
    if len(block_hashes) > MAX_BLOCKS_PER_CALL:
        raise InvalidRequestError("block_hashes", f"at most {MAX_BLOCKS_PER_CALL} a call, got {len(block_hashes)}")
    if any(len(block_hash) != _HASH_BYTES for block_hash in block_hashes):
        raise InvalidRequestError("block_hashes", f"must have {_HASH_BYTES} bytes each")
    return Namespace(namespace), [BlockHash(block_hash) for block_hash in block_hashes]


def _time_limit_s(call: ServerCall) -> float:
    remaining_s = call.time_remaining_s()
    return _MAX_CALL_S if remaining_s is None else min(_MAX_CALL_S, remaining_s)
