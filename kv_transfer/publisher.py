"""Puts blocks into the store outside the engine's step: staging rows are filled in the step, a thread stores them.

The step never waits: where no staging row is free, the block is not published.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.blocks import BlockKey
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.notices import Notice, NoticeSender, TransferTotals
from kv_transfer.store import BlockStore, PutOutcome, leading_count
from tandem.faults import Faults

logger = logging.getLogger(__name__)

# After the last job: the workers that wait for its blocks have the processor first.
_QUIET_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    rows: list[int]
    keys: list[BlockKey]
    tag: str
    prompt_keys: list[BlockKey] | None


class Publisher:
    """One thread and a fixed number of staging rows. `close` ends it."""

    def __init__(
        self,
        tensors: KvTensors,
        store: BlockStore,
        notices: NoticeSender,
        totals: TransferTotals,
        *,
        staging_bytes: int,
        evict_after_bytes: int,
        faults: Faults,
    ) -> None:
        self._tensors = tensors
        self._store = store
        self._notices = notices
        self._totals = totals
        self._faults = faults
        self._evict_after_bytes = evict_after_bytes
        self._unevicted_bytes = 0
        self._staging = np.zeros((max(1, staging_bytes // tensors.block_bytes), tensors.block_bytes), dtype=np.uint8)
        self._staging[:] = 0  # touches the pages now: fresh ones cost ten times a copy
        self._free = list(range(len(self._staging)))
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-publisher", daemon=True)
        self._thread.start()

    def submit(self, block_ids: Sequence[int], keys: Sequence[BlockKey], *, tag: str, prompt_keys: list[BlockKey] | None) -> None:
        """Stages the blocks that the store lacks, as far as rows are free.

        `prompt_keys` are given with a prompt's last chunk: a "published" notice follows, with how many leading ones the store holds.
        """
        held = self._store.contains(keys)
        wanted = [(block_id, key) for block_id, key, is_held in zip(block_ids, keys, held, strict=True) if not is_held]
        with self._lock:
            rows = [self._free.pop() for _ in range(min(len(wanted), len(self._free)))]
            self._totals.unstored_blocks += len(wanted) - len(rows)
        staged = wanted[: len(rows)]
        self._tensors.gather([block_id for block_id, _ in staged], [self._staging[row] for row in rows])
        if rows or prompt_keys is not None:
            self._jobs.put(_Job(rows=rows, keys=[key for _, key in staged], tag=tag, prompt_keys=prompt_keys))

    def close(self) -> None:
        """Ends the thread after the jobs that are there."""
        self._jobs.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            # Each on its own: whoever waits for the notice must get one, whatever became of the blocks.
            self._attempt(self._publish, job)
            with self._lock:
                self._free.extend(job.rows)
            self._attempt(self._send_published, job)
            self._attempt(self._evict, job)

    def _next_job(self) -> _Job | None:
        """The next job; once there was none for a while, the store makes room ahead of time, a block at a time."""
        timeout_s: float | None = _QUIET_S
        while True:
            try:
                return self._jobs.get(timeout=timeout_s)
            except queue.Empty:
                timeout_s = 0.0 if self._store.add_spare(self._tensors.block_bytes) else None

    def _attempt(self, step: Callable[[_Job], None], job: _Job) -> None:
        try:
            step(job)
        except Exception:  # the thread's root: a failed publish is a future miss, not the end of publishing
            logger.exception("publish_failed step=%s", step.__name__)

    def _publish(self, job: _Job) -> None:
        if job.rows and (delay_s := self._faults.delay_s("kv_publish.delay_s")):
            time.sleep(delay_s)
        rows = [self._staging[row] for row in job.rows]
        keys = list(job.keys)
        for index in reversed([index for index in range(len(rows)) if self._faults.fires("kv_put.drop_every")]):
            del rows[index], keys[index]
        outcomes = self._store.put(keys, [memoryview(row) for row in rows])
        stored, no_room = (outcomes.count(outcome) for outcome in (PutOutcome.STORED, PutOutcome.NO_ROOM))
        stored_bytes = stored * self._tensors.block_bytes
        self._totals.published_blocks += stored
        self._totals.published_bytes += stored_bytes
        with self._lock:
            self._totals.unstored_blocks += no_room
        self._unevicted_bytes += self._evict_after_bytes if no_room else stored_bytes

    def _send_published(self, job: _Job) -> None:
        if job.prompt_keys is not None:
            blocks = leading_count(self._store.contains(job.prompt_keys))
            payload_bytes = blocks * self._tensors.block_bytes
            self._notices.send(Notice(kind="published", tag=job.tag, blocks=blocks, payload_bytes=payload_bytes, totals=self._totals))

    def _evict(self, job: _Job) -> None:
        if self._unevicted_bytes >= self._evict_after_bytes:
            self._unevicted_bytes = 0
            self._totals.evicted_blocks += self._store.evict()
