"""Keeps the cluster's directory up to date with what this node's arena holds, by looking at its columns a few times a second.

Asks nobody for anything: a directory that is behind costs other nodes a recompute.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import numpy as np

from kv_transfer.arena import Arena, SlotState
from tandem.domain import BlockHash, Namespace
from tandem.errors import UnavailableError

logger = logging.getLogger(__name__)

_LOOK_S = 0.25  # 0.1 ms each
_TTL_S = 600.0
_NAMESPACE_BYTES = 16


class Directory(Protocol):
    """The cluster's, `redis_directory.RedisDirectory`."""

    async def announce(self, namespace: Namespace, hashes: list[BlockHash], address: str, ttl_s: float) -> None:
        """The store service at `address` holds these blocks."""

    async def withdraw(self, namespace: Namespace, hashes: list[BlockHash], address: str) -> None:
        """It does not any more."""


class Holdings:
    """What has been announced of one arena under `address`."""

    def __init__(self, arena: Arena, directory: Directory, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._arena = arena
        self._directory = directory
        self._address = address
        self._clock = clock
        self._announced = np.zeros(arena.geometry.num_slots, np.int64)  # generation + 1 of what was announced; 0: nothing
        self._keys: dict[int, bytes] = {}
        self._refresh_s = clock() + _TTL_S / 2
        self._is_lost = False

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            try:
                await self.look()
            except UnavailableError as error:
                if not self._is_lost:
                    logger.warning("directory_lost error=%s", error.message)
                self._is_lost = True
                self._announced[:] = 0  # it may come back empty
                self._keys.clear()
            else:
                self._is_lost = False
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Announces what came, withdraws what went. Raises UnavailableError."""
        if self._clock() >= self._refresh_s:
            self._refresh_s = self._clock() + _TTL_S / 2
            self._announced[:] = 0
        generations = self._arena.generation.astype(np.int64) + 1
        is_held = self._arena.state == SlotState.COMMITTED
        gone = np.flatnonzero((self._announced != 0) & (~is_held | (self._announced != generations)))
        new = np.flatnonzero(is_held & (self._announced != generations))
        if len(gone):
            await self._tell(self._directory.withdraw, [self._keys.pop(slot) for slot in gone.tolist() if slot in self._keys])
            self._announced[gone] = 0
        if len(new):
            keys = {slot: self._arena.key_at(slot) for slot in new.tolist()}
            await self._tell(self._announce, keys.values())
            self._keys.update(keys)
            self._announced[new] = generations[new]

    async def withdraw(self) -> None:
        """Takes all of it back: the service ends. Raises UnavailableError."""
        keys, self._keys = self._keys, {}
        self._announced[:] = 0
        await self._tell(self._directory.withdraw, keys.values())

    async def _announce(self, namespace: Namespace, hashes: list[BlockHash], address: str) -> None:
        await self._directory.announce(namespace, hashes, address, _TTL_S)

    async def _tell(self, say: Callable[[Namespace, list[BlockHash], str], Awaitable[None]], keys: Iterable[bytes]) -> None:
        by_namespace: defaultdict[Namespace, list[BlockHash]] = defaultdict(list)
        for key in keys:
            by_namespace[Namespace(key[:_NAMESPACE_BYTES].hex())].append(BlockHash(key[_NAMESPACE_BYTES:]))
        for namespace, hashes in by_namespace.items():
            await say(namespace, hashes, self._address)
