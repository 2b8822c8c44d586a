"""Caches to compare the store's retention with: exact LRU, S3-FIFO, and the best that any could do. Must not be used to serve."""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

_MAX_FREQUENCY = 3


class BlockCache(Protocol):
    """A cache of whole blocks; `use` gets requests in order, each block at most once a request."""

    def __contains__(self, block: int) -> bool:
        """Whether the block is held."""

    def use(self, index: int, now_ms: int, blocks: Sequence[int]) -> None:
        """Request number `index` uses these blocks; those that are missing are stored."""


class ExactLru:
    """Ideal LRU: exact order, one eviction at a time, of one prompt the deepest block first."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._held: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def use(self, index: int, now_ms: int, blocks: Sequence[int]) -> None:
        """Hits first, so that no miss of this request drops one of them."""
        for block in sorted(reversed(blocks), key=lambda block: block not in self._held):
            if block in self._held:
                self._held.move_to_end(block)
                continue
            if len(self._held) >= self._capacity_blocks:
                self._held.popitem(last=False)
            self._held[block] = None
        for block in reversed(blocks):
            if block in self._held:
                self._held.move_to_end(block)


class S3Fifo:
    """S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023, algorithm 1).

    A small queue of a tenth of the capacity, a main queue of the rest, as many ghosts as the main queue holds, counts up to 3; out of the
    small queue a block moves to the main one if it was used more than once. Of one prompt the deepest block comes in first.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._small_blocks = max(1, capacity_blocks // 10)
        self._main_blocks = max(1, capacity_blocks - self._small_blocks)
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._frequency: dict[int, int] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._frequency

    def use(self, index: int, now_ms: int, blocks: Sequence[int]) -> None:
        """Hits first, then the missing blocks."""
        missing = [block for block in reversed(blocks) if block not in self._frequency]
        for block in blocks:
            if block in self._frequency:
                self._frequency[block] = min(_MAX_FREQUENCY, self._frequency[block] + 1)
        for block in missing:
            while len(self._frequency) >= self._capacity_blocks:
                self._evict()
            if block in self._ghosts:
                del self._ghosts[block]
                self._main[block] = None
            else:
                self._small[block] = None
            self._frequency[block] = 0

    def _evict(self) -> None:
        if len(self._small) < self._small_blocks and self._main:
            self._evict_main()
            return
        while self._small:
            block, _ = self._small.popitem(last=False)
            if self._frequency[block] > 1:
                self._main[block] = None
                self._frequency[block] = 0
                if len(self._main) > self._main_blocks:
                    self._evict_main()
                continue
            del self._frequency[block]
            self._ghosts[block] = None
            if len(self._ghosts) > self._main_blocks:
                self._ghosts.popitem(last=False)
            return

    def _evict_main(self) -> None:
        while self._main:
            block, _ = self._main.popitem(last=False)
            if self._frequency[block] == 0:
                del self._frequency[block]
                return
            self._frequency[block] -= 1
            self._main[block] = None


class Clairvoyant:
    """Knows the future: holds the blocks whose next use is nearest, and none that is never used again (Belady's MIN with bypass).

    A held block is an interval between two uses and at most `capacity_blocks` are open at once; dropping the one that ends last is
    optimal (Carlisle and Lloyd, 1995). The first block of a chain is used no later than the next, so its hits are leading: it bounds both
    rates. O(blocks x log(blocks)).
    """

    def __init__(self, capacity_blocks: int, requests: Sequence[Sequence[int]]) -> None:
        self._capacity_blocks = capacity_blocks
        self._held: dict[int, int] = {}  # block to the number of the request that uses it next
        self._last_first: list[tuple[int, int, int]] = []
        self._next_uses: list[list[int | None]] = []
        upcoming: dict[int, int] = {}
        for index in reversed(range(len(requests))):
            self._next_uses.append([upcoming.get(block) for block in requests[index]])
            upcoming.update(dict.fromkeys(requests[index], index))
        self._next_uses.reverse()

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def use(self, index: int, now_ms: int, blocks: Sequence[int]) -> None:
        """Keeps those with a future; the farthest and deepest go first."""
        for position, (block, next_use) in enumerate(zip(blocks, self._next_uses[index], strict=True)):
            self._held.pop(block, None)
            if next_use is not None:
                self._held[block] = next_use
                heapq.heappush(self._last_first, (-next_use, -position, block))
        while len(self._held) > self._capacity_blocks:
            next_use, _, block = heapq.heappop(self._last_first)
            if self._held.get(block) == -next_use:
                del self._held[block]
