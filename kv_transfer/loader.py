"""Copies blocks from the store into the engine's tensors: the worker's half of loading.

A block that is missing or fails its check is reported by block id, and the engine computes it.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.blocks import BlockKey
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.notices import Notice, NoticeSender, TransferTotals
from kv_transfer.planner import LoadJob
from kv_transfer.store import BlockOutcome, BlockStore, leading_count
from tandem.domain import Namespace

logger = logging.getLogger(__name__)

_BATCH_BLOCKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """How a load ended: the engine blocks that hold nothing valid."""

    request_id: str
    invalid_block_ids: list[int]


class Loader:
    """Loads inside the step by `load`, outside of it by `load_later`. Two buffers, as both may run at once."""

    def __init__(self, tensors: KvTensors, store: BlockStore, namespace: Namespace, notices: NoticeSender, totals: TransferTotals) -> None:
        self._tensors = tensors
        self._store = store
        self._namespace = namespace
        self._notices = notices
        self._totals = totals
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._step_buffer = self._make_buffer()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def _make_buffer(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        buffer = np.zeros((_BATCH_BLOCKS, self._tensors.block_bytes), dtype=np.uint8)
        buffer[:] = 0  # touches the pages now
        return buffer

    def load(self, job: LoadJob) -> LoadResult:
        """Loads now; returns which blocks could not be loaded."""
        return self._load(job, self._step_buffer)

    def load_later(self, job: LoadJob) -> None:
        """Loads on the loader's thread; `take_results` has the end of it exactly once, whatever happens."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-loader", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def take_results(self) -> list[LoadResult]:
        """Loads that ended on the thread since the last call."""
        results: list[LoadResult] = []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def close(self) -> None:
        """Ends the thread after the jobs that are there."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        buffer = self._make_buffer()
        while (job := self._jobs.get()) is not None:
            try:
                self._results.put(self._load(job, buffer))
            except Exception:  # the thread's root: a request must never wait for a load that cannot end
                logger.exception("load_failed")
                self._results.put(LoadResult(request_id=job.request_id, invalid_block_ids=job.block_ids))

    def _load(self, job: LoadJob, buffer: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]") -> LoadResult:
        valid = 0
        keys = [BlockKey(self._namespace, block_hash) for block_hash in job.hashes]
        for start in range(0, len(keys), _BATCH_BLOCKS):
            batch = keys[start : start + _BATCH_BLOCKS]
            rows = [buffer[index] for index in range(len(batch))]
            outcomes = self._store.get_into(batch, [memoryview(row) for row in rows])
            good = leading_count([outcome is BlockOutcome.HIT for outcome in outcomes])
            self._tensors.scatter(job.block_ids[start : start + good], rows[:good])
            self._count(outcomes, good)
            valid += good
            if good < len(batch):
                break
        payload_bytes = valid * self._tensors.block_bytes
        self._notices.send(
            Notice(
                kind="loaded", tag=job.tag, blocks=valid, payload_bytes=payload_bytes, local_tokens=job.local_tokens, totals=self._totals
            )
        )
        return LoadResult(request_id=job.request_id, invalid_block_ids=list(job.block_ids[valid:]))

    def _count(self, outcomes: Sequence[BlockOutcome], good: int) -> None:
        with self._lock:
            self._totals.loaded_blocks += good
            self._totals.loaded_bytes += good * self._tensors.block_bytes
            self._totals.corrupt_blocks += sum(outcome is BlockOutcome.CORRUPT for outcome in outcomes)
            self._totals.missing_blocks += sum(outcome is BlockOutcome.MISSING for outcome in outcomes)
