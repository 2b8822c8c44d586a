"""Blocks from other nodes' stores into this node's: each block fetched once at a time, within bounds.

Must not serve, and moves no bytes itself: `peer_fetch.py` does, in threads. A block that does not come is a miss.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kv_transfer.arena_store import ArenaStore
from kv_transfer.peer_fetch import PeerConnections, PeerFetch
from kv_transfer.store_totals import StoreTotals
from tandem.channel_pool import ChannelPool
from tandem.domain import BlockHash, Namespace
from tandem.errors import TandemError
from tandem.rpc import call
from tandem.v1 import store_pb2

_MAX_FETCHES = 16  # of what is there: more would not be quicker on one link
_MAX_FOLLOWED = 64  # prompts that are still being computed: they wait for the most part
_STAT_S = 2.0

_Key = tuple[Namespace, BlockHash]


class BlockCopier:
    """Fetches into `store`. Belongs to one event loop."""

    def __init__(self, store: ArenaStore, channels: ChannelPool, totals: StoreTotals) -> None:
        self._store = store
        self._channels = channels
        self._totals = totals
        self._connections = PeerConnections()
        self._addresses: dict[str, tuple[str, int]] = {}  # where a store service answers peers, by its own address
        self._coming: dict[_Key, asyncio.Event] = {}
        self._fetching, self._following = asyncio.Semaphore(_MAX_FETCHES), asyncio.Semaphore(_MAX_FOLLOWED)
        self._threads = ThreadPoolExecutor(_MAX_FETCHES + _MAX_FOLLOWED, thread_name_prefix="kv-fetch")

    async def copy(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        from_address: str,
        timeout_s: float,
        wait_s: float = 0.0,
        *,
        first_position: int = 0,
    ) -> int:
        """Fetches the blocks that are not here from the service at `from_address`, in order; returns how many came by this call.

        Those that it does not hold yet are waited for, up to `wait_s`. Blocks that another call is fetching are waited for too, and
        fetched by this one where that call fails. Raises TimeoutError, UnavailableError where the other service is gone or silent, and
        ProtocolError; what had come by then stays.
        """
        copied = 0
        wanted = list(dict.fromkeys(hashes))
        async with asyncio.timeout(timeout_s):
            while wanted:
                coming = [block_hash for block_hash in wanted if (namespace, block_hash) in self._coming]
                if len(coming) < len(wanted):
                    claimed = [block_hash for block_hash in wanted if (namespace, block_hash) not in self._coming]
                    first = first_position + wanted.index(claimed[0])
                    copied += await self._claim(namespace, claimed, from_address, timeout_s, wait_s, first)
                else:
                    await self._coming[namespace, coming[0]].wait()
                wanted = coming
        return copied

    async def _claim(
        self, namespace: Namespace, hashes: list[BlockHash], from_address: str, timeout_s: float, wait_s: float, first_position: int
    ) -> int:
        """Fetches those that are not here; whoever waits for any of them is let go on every way out."""
        ended = asyncio.Event()
        self._coming.update(dict.fromkeys(((namespace, block_hash) for block_hash in hashes), ended))
        try:
            held = self._store.contains(namespace, hashes)
            absent = [block_hash for block_hash, is_held in zip(hashes, held, strict=True) if not is_held]
            if not absent:
                return 0
            async with self._following if wait_s else self._fetching:
                return await self._fetch(namespace, absent, from_address, timeout_s, wait_s, first_position + held.index(False))
        finally:
            for block_hash in hashes:
                del self._coming[namespace, block_hash]
            ended.set()

    async def _fetch(
        self, namespace: Namespace, hashes: list[BlockHash], from_address: str, timeout_s: float, wait_s: float, first_position: int
    ) -> int:
        fetch = PeerFetch(self._store, self._connections, self._totals, await self._peer_address(from_address))
        running = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: fetch.run(namespace, hashes, timeout_s=timeout_s, wait_s=wait_s, first_position=first_position)
        )
        try:
            return await asyncio.shield(running)
        except TandemError:
            gone = self._addresses.pop(from_address, None)  # it may have begun again elsewhere
            if gone is not None:
                self._connections.forget(gone)
            raise
        except asyncio.CancelledError:
            fetch.abort()
            # Its slots are in use until it has ended, which it does at once.
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def _peer_address(self, address: str) -> tuple[str, int]:
        """Where the store service at `address` answers peers. Raises TandemError."""
        known = self._addresses.get(address)
        if known is None:
            answer = await call(
                self._channels(address),
                "tandem.v1.Store/Stat",
                store_pb2.StoreStatRequest(),
                store_pb2.StoreStatResponse,
                timeout_s=_STAT_S,
            )
            known = self._addresses[address] = (address.rpartition(":")[0].strip("[]"), answer.peer_port)
        return known

    def close(self) -> None:
        """Lets connections and threads go."""
        self._connections.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
