"""Saves and loads of blocks that lie as an engine's KV tensors do: a row a layer, so that one block is many short copies.

Layouts are those of vLLM's CPU backend (layers, blocks, heads x tokens x channels); `vllm_layout.py` measures a real engine's tensors.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copies import BlockRows
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.bench.kv.options import BATCH_BLOCKS
from tandem.bench.kv.rows import Samples, calls_us, gbps, rates_row
from tandem.domain import BlockHash, Namespace

_NAMESPACE = Namespace(hashlib.sha256(b"tandem kv bench, engine layout").hexdigest()[:32])
# Row bytes and layers: 64 KiB blocks of 16 KiB rows are the bundled model's.
LAYOUTS = ((4 << 10, 32), (16 << 10, 4), (32 << 10, 32), (64 << 10, 16))
_ENGINE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One layout's samples."""

    samples: Samples
    memcpy_gbps: list[float]
    commits_s: list[float]


def engine_like(row_bytes: int, layers: int, engine_bytes: int = _ENGINE_BYTES) -> BlockRows:
    """Zeroed rows as vLLM allocates them: all of one layer's blocks together."""
    blocks = max(2 * BATCH_BLOCKS, engine_bytes // (row_bytes * layers))
    memory = np.full((layers, blocks, row_bytes), 1, np.uint8)
    return BlockRows(tuple(memory))


def measure_layout(rows: BlockRows, folder: Path, *, repetitions: int, seed: int) -> Measured:
    """Saves and loads of 32 random blocks in one call each, beside memcpy of as many whole blocks; the blocks are verified.

    A save is what an engine's step waits for, checksums included; a thread makes the blocks visible afterwards, and is timed apart.
    """
    rng = np.random.default_rng(seed)
    blocks, payload_bytes = len(rows.views[0]), rows.payload_bytes
    batch_bytes = BATCH_BLOCKS * payload_bytes
    store = ArenaStore(folder, capacity_bytes=max(64 << 20, 8 * batch_bytes))
    source, target = np.full(_ENGINE_BYTES, 1, np.uint8), np.full(_ENGINE_BYTES, 2, np.uint8)
    samples, memcpy_gbps, commits_s = Samples(), list[float](), list[float]()
    try:
        for repetition in range(repetitions + 1):
            ids = rng.permutation(blocks)[: 2 * BATCH_BLOCKS]
            saved, loaded = ids[:BATCH_BLOCKS].astype(np.int64), ids[BATCH_BLOCKS:].astype(np.int64)
            for view in rows.views:
                view[saved] = rng.integers(0, 256, (BATCH_BLOCKS, view.shape[1]), np.uint8)
            hashes = [BlockHash(rng.bytes(32)) for _ in range(BATCH_BLOCKS)]
            store.prepare(payload_bytes, BATCH_BLOCKS)
            start = int(rng.integers(0, _ENGINE_BYTES // payload_bytes - BATCH_BLOCKS + 1)) * payload_bytes
            copy_s = _timed(partial(_memcpy, source, target, start, payload_bytes))
            begin_s = time.perf_counter()
            staged = store.stage(_NAMESPACE, hashes, rows, saved)
            save_s = time.perf_counter() - begin_s
            samples.errors += len(hashes) - store.commit(staged).count(PutOutcome.STORED)
            commit_s = time.perf_counter() - begin_s - save_s
            load_s = _timed(partial(_load, store, hashes, rows, loaded, samples))
            samples.errors += sum(not np.array_equal(view[saved], view[loaded]) for view in rows.views)
            store.drop(_NAMESPACE, hashes)
            commits_s.append(commit_s)
            if repetition:  # the first one touches pages
                memcpy_gbps.append(gbps(batch_bytes, copy_s))
                samples.put_gbps.append(gbps(batch_bytes, save_s))
                samples.get_gbps.append(gbps(batch_bytes, load_s))
    finally:
        store.close()
    return Measured(samples=samples, memcpy_gbps=memcpy_gbps, commits_s=commits_s)


def layout_row(rows: BlockRows, measured: Measured, source: str) -> dict[str, object]:
    """Of the report; `put` is a save, `get` a load. `source`: whose tensors."""
    return {
        **{"kind": "ours", "layout": "engine", "source": source, "checksum": True, "batch_blocks": BATCH_BLOCKS},
        **{"block_bytes": rows.payload_bytes, "row_bytes": rows.views[0].shape[1], "layers": len(rows.views)},
        **rates_row(measured.samples, measured.memcpy_gbps),
        **calls_us("commit", measured.commits_s),
    }


def _timed(call: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    call()
    return time.perf_counter() - begin_s


def _memcpy(source: NDArray[np.uint8], target: NDArray[np.uint8], start: int, block_bytes: int) -> None:
    for at in range(start, start + BATCH_BLOCKS * block_bytes, block_bytes):
        target[at : at + block_bytes] = source[at : at + block_bytes]


def _load(store: ArenaStore, hashes: list[BlockHash], rows: BlockRows, ids: NDArray[np.int64], samples: Samples) -> None:
    outcomes = store.load(_NAMESPACE, hashes, rows, ids)
    samples.errors += len(hashes) - outcomes.count(BlockOutcome.HIT)
