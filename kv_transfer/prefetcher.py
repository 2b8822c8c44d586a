"""Brings a prompt's leading blocks into this node's arena from wherever they are: lower tiers, then other nodes by the directory.

Decides only where to look. What is nowhere is computed by whoever asked.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copier import BlockCopier
from kv_transfer.store import leading_count
from kv_transfer.tiered_store import TieredStore
from tandem.domain import BlockHash, Namespace
from tandem.errors import TandemError, UnavailableError

logger = logging.getLogger(__name__)

_MAX_SOURCES = 4  # nodes that one prompt is brought together from
_LEASE_S = 10.0


class Holders(Protocol):
    """The cluster's directory."""

    async def holders(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> list[frozenset[str]]:
        """Addresses of the store services that hold each block, of the leading ones."""


class Prefetcher:
    """Of one store service. Other nodes are asked once `set_directory` has been called."""

    def __init__(self, store: ArenaStore, tiers: TieredStore, copier: BlockCopier) -> None:
        self._store = store
        self._tiers = tiers
        self._copier = copier
        self._directory: Holders | None = None
        self._address = ""

    def set_directory(self, directory: Holders, address: str) -> None:
        """Where to look up holders; `address` is this service's own."""
        self._directory, self._address = directory, address

    async def bring(self, namespace: Namespace, hashes: Sequence[BlockHash], timeout_s: float) -> int:
        """How many leading ones are in the arena in the end; they are leased for a moment. Never raises for what does not come."""
        held = leading_count(self._store.contains(namespace, hashes, lease_s=_LEASE_S))
        if held < len(hashes):
            held += await asyncio.to_thread(self._tiers.promote, namespace, hashes[held:], held)
        if held < len(hashes) and self._directory is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._from_nodes(self._directory, namespace, hashes[held:], timeout_s, held)
            except (TandemError, TimeoutError) as error:
                logger.warning("prefetch_ended_early error=%r", error)
            held = leading_count(self._store.contains(namespace, hashes, lease_s=_LEASE_S))
        return held

    async def _from_nodes(
        self, directory: Holders, namespace: Namespace, hashes: Sequence[BlockHash], timeout_s: float, first_position: int
    ) -> None:
        try:
            holders = [found - {self._address} for found in await directory.holders(namespace, hashes)]
        except UnavailableError:
            return  # it says so itself where it is kept
        done, lost = 0, set[str]()
        for _ in range(_MAX_SOURCES):
            rest = [found - lost for found in holders[done:]]
            if not rest or not rest[0]:
                return
            run, source = max((_run(rest, address), address) for address in rest[0])
            wanted = hashes[done : done + run]
            try:
                await self._copier.copy(namespace, wanted, source, timeout_s, first_position=first_position + done)
            except TandemError as error:  # a hint that has had its day
                logger.warning("prefetch_source_lost source=%s error=%r", source, error)
            came = leading_count(self._store.contains(namespace, wanted))
            done += came
            if came < len(wanted):
                lost.add(source)


def _run(holders: Sequence[frozenset[str]], address: str) -> int:
    """Leading blocks that this one holds."""
    return leading_count([address in found for found in holders])
