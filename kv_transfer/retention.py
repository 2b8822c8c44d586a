"""Which blocks of a full store go first. Must not read a clock or drop anything: columns and the time in, slots out.

All state is a hint of the process that evicts: losing it costs hit rate and nothing else. Both policies rank a block no higher than the
blocks before it in its prompt (those are used no later and no less often), so that what is kept stays usable as a leading run.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.errors import ConfigError

DEFAULT_POLICY = "reuse"
# Evicted blocks remembered for each block of capacity: 4 lose a quarter of the gain at 1,000 blocks of Mooncake's conversation trace, and
# add 1 % at 10,000.
_GHOSTS_PER_BLOCK = 8
# Classes of blocks: reused 0, 1, 2, and 3 or more times. Eight gain 1.5 % more at 10,000 blocks of that trace, and lose 2 % more to LRU
# where counts say nothing of the future.
_CLASSES = 4
# Measured by `tandem.bench.kv_replay` on that trace: 1 gains less at each capacity, a constant part loses to LRU in large stores.
_PRESSURE_GAIN = 2.0
_MAX_PRESSURE = 8.0
# What one round forgets: with 1/32 of the capacity a round, counts halve in about 1.4 turnovers of the store.
_KEPT_FRACTION = 63 / 64
# Blocks that a class is taken to have had, at the mean ratio, before any was seen.
_PRIOR_BLOCKS = 20.0

Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotColumns:
    """The candidates, one element each, all of shape (n,). Values may be torn between columns: readers write them without a lock.

    `last_use_ms`, `inserted_ms` (uint32): a clock that wraps; both are equal until the first use. `uses` (uint16): hits, plus what
    `uses_at_insertion` said. `position` (uint32): index of the block in its prompt's chain.
    """

    last_use_ms: NDArray[np.uint32]
    inserted_ms: NDArray[np.uint32]
    uses: NDArray[np.uint16]
    position: NDArray[np.uint32]


class Retention(Protocol):
    """One store's policy. Keys are fingerprints of any width; equal ones of two blocks cost accuracy only."""

    def uses_at_insertion(self, fingerprint: int) -> int:
        """What the new block's `uses` starts at."""

    def victims(self, columns: SlotColumns, now_ms: int, count: int) -> Slots:
        """Indices of the `count` candidates to drop, or of all; ties go deepest first, then by index. O(n)."""

    def note_evicted(self, fingerprints: Sequence[int], uses: Sequence[int]) -> None:
        """These were dropped to make room; not for blocks that were damaged or deleted."""


class Lru:
    """The least recently used first; of one prompt the deepest first, as vLLM frees blocks. Keeps nothing."""

    def uses_at_insertion(self, fingerprint: int) -> int:
        """Always 0."""
        return 0

    def victims(self, columns: SlotColumns, now_ms: int, count: int) -> Slots:
        """As the protocol says."""
        return _highest(_ages_ms(columns.last_use_ms, now_ms), columns.position, count)

    def note_evicted(self, fingerprints: Sequence[int], uses: Sequence[int]) -> None:
        """Forgets them."""


class ReuseRatio:
    """LRU, with a block's age divided by how often blocks like it come back: age / ratio[uses] ** pressure, highest first.

    `ratio` is learned: of blocks used that often, the fraction that was used again, over that of the never reused, and never falling
    with `uses`. `pressure` is 2 x (reuses that came after eviction) / (reuses in time): where the store is large enough it is 0 and this
    is LRU; where most reuse comes too late, the blocks of a class with better odds are held until it comes. The idea of weighing age by
    frequency is hyperbolic caching's (Blankstein et al., USENIX ATC 2017), the table of evicted keys 2Q's (Johnson and Shasha, VLDB
    1994); a key that comes back takes its count along. At most 8 keys a block of capacity, about 100 bytes each.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._max_ghosts = _GHOSTS_PER_BLOCK * capacity_blocks
        self._ghosts: OrderedDict[int, int] = OrderedDict()  # fingerprint to uses, oldest eviction first
        self._reused = np.zeros(_CLASSES)
        self._lost = np.zeros(_CLASSES)
        self._late_blocks = 0.0
        self._timely_blocks = 0.0
        self._last_round_ms: int | None = None

    def uses_at_insertion(self, fingerprint: int) -> int:
        """0 for a key that is not remembered, else its old count and this use."""
        uses = self._ghosts.pop(fingerprint, None)
        if uses is None:
            return 0
        kind = min(uses, _CLASSES - 1)
        self._reused[kind] += 1.0
        self._lost[kind] = max(0.0, self._lost[kind] - 1.0)
        self._late_blocks += 1.0
        return uses + 1

    def victims(self, columns: SlotColumns, now_ms: int, count: int) -> Slots:
        """As the protocol says; learns from what was used since the call before."""
        ages_ms = _ages_ms(columns.last_use_ms, now_ms)
        self._learn(columns, ages_ms, now_ms)
        weights = self._ratios() ** -self.pressure
        scores = ages_ms * weights[np.minimum(columns.uses, _CLASSES - 1)]
        for counts in (self._reused, self._lost):
            counts *= _KEPT_FRACTION
        self._late_blocks *= _KEPT_FRACTION
        self._timely_blocks *= _KEPT_FRACTION
        return _highest(scores, columns.position, count)

    def note_evicted(self, fingerprints: Sequence[int], uses: Sequence[int]) -> None:
        """Remembers them, in place of the longest gone."""
        self._lost += np.bincount(np.minimum(np.asarray(uses, dtype=np.int64), _CLASSES - 1), minlength=_CLASSES)
        self._ghosts.update(zip(fingerprints, uses, strict=True))
        while len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)

    @property
    def pressure(self) -> float:
        """0 where no reuse comes too late, at most 8."""
        return min(_MAX_PRESSURE, _PRESSURE_GAIN * self._late_blocks / max(self._timely_blocks, 1.0))

    def _learn(self, columns: SlotColumns, ages_ms: NDArray[np.float64], now_ms: int) -> None:
        """Counts the blocks used since the last round, once each: one block of every prompt must not stand for all."""
        is_used = columns.last_use_ms != columns.inserted_ms
        if self._last_round_ms is not None:
            is_used &= ages_ms < (now_ms - self._last_round_ms) % 2**32
        self._last_round_ms = now_ms
        before = np.clip(columns.uses[is_used].astype(np.int64) - 1, 0, _CLASSES - 1)
        self._reused += np.bincount(before, minlength=_CLASSES)
        self._timely_blocks += len(before)

    def _ratios(self) -> NDArray[np.float64]:
        """Shape (classes,), from 1 up."""
        reused, lost = self._reused.sum() + 1.0, self._lost.sum() + 1.0
        fractions = (self._reused + _PRIOR_BLOCKS * reused / (reused + lost)) / (self._reused + self._lost + _PRIOR_BLOCKS)
        ratios: NDArray[np.float64] = np.maximum.accumulate(fractions / fractions[0])
        return ratios


# Makes the policy of a store of that many blocks.
POLICIES: dict[str, Callable[[int], Retention]] = {"lru": lambda capacity_blocks: Lru(), "reuse": ReuseRatio}


def make_retention(name: str, capacity_blocks: int) -> Retention:
    """The named policy; raises ConfigError listing the valid names."""
    try:
        return POLICIES[name](capacity_blocks)
    except KeyError as error:
        raise ConfigError(f"no retention policy {name!r}: choose one of {', '.join(sorted(POLICIES))}") from error


def _ages_ms(last_use_ms: NDArray[np.uint32], now_ms: int) -> NDArray[np.float64]:
    """Across the clock's wrap (49.7 days). A use stamped up to a minute after `now_ms` by another process counts as now."""
    ages_ms = np.uint32(now_ms % 2**32) - last_use_ms
    return np.where(ages_ms > 2**32 - 60_000, 0, ages_ms).astype(np.float64)


def _highest(scores: NDArray[np.float64], position: NDArray[np.uint32], count: int) -> Slots:
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, ties = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    deepest_first = ties[np.argsort(-position[ties].astype(np.int64), kind="stable")]
    return np.concatenate((above, deepest_first[: count - len(above)]))
