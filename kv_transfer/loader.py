"""Copies blocks from the store into the engine's tensors: the worker's half of loading.

A block that is missing or fails its check is reported by block id, and the engine computes it.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kv_transfer.copies import BlockRows
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.notices import Notice, NoticeSender, TransferTotals
from kv_transfer.planner import LoadJob
from kv_transfer.store import BlockOutcome, leading_count
from tandem.domain import BlockHash, Namespace

logger = logging.getLogger(__name__)


class LoadingStore(Protocol):
    """A store that copies straight into an engine's rows."""

    def load(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        rows: BlockRows,
        block_ids: npt.NDArray[np.int64],
        *,
        only_leading: bool = False,
    ) -> list[BlockOutcome]:
        """Copies block i to block id i of `rows` and verifies it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """How a load ended: the engine blocks that hold nothing valid."""

    request_id: str
    invalid_block_ids: list[int]


class Loader:
    """Loads inside the step by `load`, outside of it by `load_later`."""

    def __init__(
        self, tensors: KvTensors, store: LoadingStore, namespace: Namespace, notices: NoticeSender, totals: TransferTotals
    ) -> None:
        self._tensors = tensors
        self._store = store
        self._namespace = namespace
        self._notices = notices
        self._totals = totals
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

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
        while (job := self._jobs.get()) is not None:
            try:
                self._results.put(self.load(job))
            except Exception:  # the thread's root: a request must never wait for a load that cannot end
                logger.exception("load_failed")
                self._results.put(LoadResult(request_id=job.request_id, invalid_block_ids=job.block_ids))

    def load(self, job: LoadJob) -> LoadResult:
        """Loads now, up to the first block that cannot be; returns which could not."""
        rows, block_ids = self._tensors.to_load(job.block_ids)
        outcomes = self._store.load(self._namespace, job.hashes, rows, block_ids, only_leading=True)
        valid = leading_count([outcome is BlockOutcome.HIT for outcome in outcomes])
        self._tensors.loaded(job.block_ids[:valid], rows)
        payload_bytes = valid * self._tensors.block_bytes
        with self._lock:
            self._totals.loaded_blocks += valid
            self._totals.loaded_bytes += payload_bytes
            if valid < len(outcomes):
                self._totals.corrupt_blocks += outcomes[valid] is BlockOutcome.CORRUPT
                self._totals.missing_blocks += outcomes[valid] is BlockOutcome.MISSING
        self._notices.send(
            Notice(
                kind="loaded", tag=job.tag, blocks=valid, payload_bytes=payload_bytes, local_tokens=job.local_tokens, totals=self._totals
            )
        )
        return LoadResult(request_id=job.request_id, invalid_block_ids=list(job.block_ids[valid:]))
