"""The store that all replicas share, and what it tells the router of its blocks. Must not take time: links do.

It stands on a node of its own, so that every replica reaches it over its link.
"""

from collections.abc import Callable, Sequence

from tandem.domain import BlockHash
from tandem.held_blocks import BlockChange
from tandem.sim.block_cache import BlockCache
from tandem.sim.timeline import Timeline

STORE_NODE = "store"
TELL_EVERY_S = 0.2


class Store:
    """A cache that tells its changes on a 5 Hz grid, `delay_s` late."""

    def __init__(self, capacity_blocks: int, timeline: Timeline, *, delay_s: float, tell: Callable[[BlockChange], None]) -> None:
        self._cache = BlockCache(capacity_blocks)
        self._timeline = timeline
        self._delay_s = delay_s
        self._tell = tell
        self._is_planned = False

    def match(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are here."""
        return self._cache.match(block_hashes)

    def put(self, block_hashes: Sequence[BlockHash]) -> None:
        """The chain is here and was just used."""
        self._cache.put(block_hashes)
        if self._cache.has_changed and not self._is_planned:
            self._is_planned = True
            self._timeline.at((self._timeline.now_s // TELL_EVERY_S + 1) * TELL_EVERY_S, self._send)

    def _send(self) -> None:
        self._is_planned = False
        self._timeline.at(self._timeline.now_s + self._delay_s, self._tell, self._cache.take_change())
