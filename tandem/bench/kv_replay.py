"""Replays a trace's blocks through the store's retention policies, beside ideal caches of the same size. Must not read a clock.

The rule is the same for all: a request's hits are what is held when it comes; then all its blocks are used and the missing ones stored.
A leading hit is one before the first miss: only those save an engine work. Stored at once, that is without the time of the prefill.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kv_transfer.retention import DEFAULT_POLICY, POLICIES, SlotColumns, make_retention
from tandem.bench.kv_replay_peers import BlockCache, Clairvoyant, ExactLru, S3Fifo
from tandem.errors import ConfigError
from tandem.workload import TraceRow, parse_trace

DEFAULT_CAPACITIES_BLOCKS = (1_000, 3_000, 10_000, 30_000, 100_000)
# Of the capacity, dropped in one round once no slot is free.
BATCH_FRACTION = 1 / 32
_REFERENCE = "exact_lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRow:
    """One policy at one capacity. Rates are fractions of all blocks of all requests; `ratio_to_lru`: of leading hit rates, to exact LRU."""

    kind: str  # ours, ablation, peer, bound
    policy: str
    capacity_blocks: int
    hit_rate: float
    leading_hit_rate: float
    ratio_to_lru: float | None


class ColumnCache:
    """The real policy over the store's columns, with the store's batches."""

    def __init__(self, policy: str, capacity_blocks: int) -> None:
        self._retention = make_retention(policy, capacity_blocks)
        self._last_use_ms = np.zeros(capacity_blocks, dtype=np.uint32)
        self._inserted_ms = np.zeros(capacity_blocks, dtype=np.uint32)
        self._uses = np.zeros(capacity_blocks, dtype=np.uint16)
        self._position = np.zeros(capacity_blocks, dtype=np.uint32)
        self._blocks = np.full(capacity_blocks, -1, dtype=np.int64)
        self._slots: dict[int, int] = {}
        self._free = list(range(capacity_blocks))[::-1]
        self._batch_blocks = max(1, int(capacity_blocks * BATCH_FRACTION))

    def __contains__(self, block: int) -> bool:
        return block in self._slots

    def use(self, index: int, now_ms: int, blocks: Sequence[int]) -> None:
        """Counts the hits, then stores what is missing."""
        held = np.array([self._slots[block] for block in blocks if block in self._slots], dtype=np.int64)
        self._last_use_ms[held] = now_ms
        self._uses[held] = np.minimum(self._uses[held], np.iinfo(np.uint16).max - 1) + 1
        for position, block in enumerate(blocks):
            if block not in self._slots:
                self._store(block, position, now_ms)

    def _store(self, block: int, position: int, now_ms: int) -> None:
        if not self._free:
            self._evict(now_ms)
        slot = self._free.pop()
        self._slots[block], self._blocks[slot] = slot, block
        self._last_use_ms[slot] = self._inserted_ms[slot] = now_ms
        self._uses[slot], self._position[slot] = min(self._retention.uses_at_insertion(block), np.iinfo(np.uint16).max), position

    def _evict(self, now_ms: int) -> None:
        columns = SlotColumns(last_use_ms=self._last_use_ms, inserted_ms=self._inserted_ms, uses=self._uses, position=self._position)
        victims = self._retention.victims(columns, now_ms, self._batch_blocks)
        gone: list[int] = self._blocks[victims].tolist()
        self._retention.note_evicted(gone, self._uses[victims].tolist())
        for block in gone:
            self._free.append(self._slots.pop(block))


def load_trace(path: Path) -> list[TraceRow]:
    """The rows of a Mooncake-format trace; raises ConfigError where the file cannot be read or is no trace."""
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace: cannot read {path}: {error}") from error


def replay_rows(
    requests: Sequence[TraceRow], capacities_blocks: Sequence[int] = DEFAULT_CAPACITIES_BLOCKS, policies: Sequence[str] = tuple(POLICIES)
) -> list[ReplayRow]:
    """One row for each policy and capacity. About 2 us a block of the trace each; raises ConfigError for wrong settings."""
    if not any(request.block_ids for request in requests):
        raise ConfigError("the trace names no blocks (hash_ids)")
    if min(capacities_blocks, default=0) < 1:
        raise ConfigError("capacities must be at least 1 block")
    return [row for capacity in capacities_blocks for row in _rows(requests, capacity, policies)]


def replay_report(requests: Sequence[TraceRow], rows: Sequence[ReplayRow]) -> dict[str, object]:
    """The report that --json writes."""
    return {
        "schema": "tandem.kv_replay/1",
        "requests": len(requests),
        "blocks": sum(len(request.block_ids) for request in requests),
        "distinct_blocks": len({block for request in requests for block in request.block_ids}),
        "batch_fraction": BATCH_FRACTION,
        "rows": [asdict(row) for row in rows],
    }


def replay(
    requests: Sequence[TraceRow], capacities_blocks: Sequence[int] = DEFAULT_CAPACITIES_BLOCKS, policies: Sequence[str] = tuple(POLICIES)
) -> dict[str, object]:
    """Both in one."""
    return replay_report(requests, replay_rows(requests, capacities_blocks, policies))


def _rows(requests: Sequence[TraceRow], capacity_blocks: int, policies: Sequence[str]) -> list[ReplayRow]:
    caches: list[tuple[str, str, Callable[[], BlockCache]]] = [
        ("peer", _REFERENCE, partial(ExactLru, capacity_blocks)),
        ("peer", "s3_fifo", partial(S3Fifo, capacity_blocks)),
        ("bound", "clairvoyant", partial(Clairvoyant, capacity_blocks, [request.block_ids for request in requests])),
    ]
    for name in policies:
        make_retention(name, capacity_blocks)  # an unknown name is an error before anything runs
        kind = "ours" if name == DEFAULT_POLICY else "ablation"
        caches.append((kind, name, partial(ColumnCache, name, capacity_blocks)))
    rates = {name: hit_rates(requests, make()) for _, name, make in caches}
    reference = rates[_REFERENCE][1]
    return [
        ReplayRow(
            kind=kind,
            policy=name,
            capacity_blocks=capacity_blocks,
            hit_rate=rates[name][0],
            leading_hit_rate=rates[name][1],
            ratio_to_lru=rates[name][1] / reference if reference else None,
        )
        for kind, name, _ in caches
    ]


def hit_rates(requests: Sequence[TraceRow], cache: BlockCache) -> tuple[float, float]:
    """Block hit rate and leading hit rate, from an empty cache on."""
    total = hits = leading = 0
    for index, request in enumerate(requests):
        held = [block in cache for block in request.block_ids]
        total += len(held)
        hits += sum(held)
        leading += (*held, False).index(False)
        cache.use(index, round(request.time_s * 1000), request.block_ids)
    return hits / total, leading / total
