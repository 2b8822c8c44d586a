"""Puts an engine's blocks into the store: copied into granted slots within the step, made visible by a thread.

The step waits for nobody: where no slot is granted, the block is not published.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kv_transfer.arena_store import Staged
from kv_transfer.copies import BlockRows
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.notices import Notice, NoticeSender, TransferTotals
from kv_transfer.store import BlockStore, PutOutcome, leading_count
from tandem.domain import BlockHash, Namespace
from tandem.faults import Faults

logger = logging.getLogger(__name__)


class StagingStore(BlockStore, Protocol):
    """A store whose put comes in two halves: the copy, which waits for nobody, and the rest."""

    @property
    def evicted_blocks(self) -> int:
        """Evicted by this process so far."""

    def prepare(self, payload_bytes: int, count: int) -> int:
        """Has `count` slots granted ahead; may evict, and take milliseconds."""

    def stage(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        rows: BlockRows,
        block_ids: npt.NDArray[np.int64],
        *,
        first_position: int = 0,
        tenant: int = 0,
    ) -> Staged:
        """Copies the leading blocks into granted slots, as far as there are some."""

    def commit(self, staged: Staged) -> list[PutOutcome]:
        """Makes them visible."""

    def announce(self) -> None:
        """Tells this node's store service that there are new blocks; never waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    staged: Staged
    tag: str
    prompt_hashes: list[BlockHash] | None


class Publisher:
    """One thread, and `granted_blocks` slots held ready for the next steps. `close` ends it."""

    def __init__(
        self,
        tensors: KvTensors,
        store: StagingStore,
        namespace: Namespace,
        notices: NoticeSender,
        totals: TransferTotals,
        *,
        granted_blocks: int,
        faults: Faults,
    ) -> None:
        self._tensors = tensors
        self._store = store
        self._namespace = namespace
        self._notices = notices
        self._totals = totals
        self._faults = faults
        self._granted_blocks = granted_blocks
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        store.prepare(tensors.block_bytes, granted_blocks)
        self._thread = threading.Thread(target=self._run, name="kv-publisher", daemon=True)
        self._thread.start()

    def submit(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        *,
        tag: str,
        prompt_hashes: list[BlockHash] | None,
        first_position: int = 0,
        tenant: int = 0,
    ) -> None:
        """Copies the blocks that the store lacks, as far as slots are granted. `tenant`: whose they are, 0 for nobody's.

        `prompt_hashes` are given with a prompt's last chunk: a "published" notice follows, with how many leading ones the store holds.
        """
        held = self._store.contains(self._namespace, hashes)
        wanted = [index for index, is_held in enumerate(held) if not is_held and not self._faults.fires("kv_put.drop_every")]
        rows, ids = self._tensors.to_save([block_ids[index] for index in wanted])
        first_position += wanted[0] if wanted else 0
        wanted_hashes = [hashes[index] for index in wanted]
        staged = self._store.stage(self._namespace, wanted_hashes, rows, ids, first_position=first_position, tenant=tenant)
        with self._lock:
            self._totals.unstored_blocks += len(wanted) - len(staged.slots)
        if len(staged.slots) or prompt_hashes is not None:
            self._jobs.put(_Job(staged=staged, tag=tag, prompt_hashes=prompt_hashes))

    def close(self) -> None:
        """Ends the thread after the jobs that are there."""
        self._jobs.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # Each on its own: whoever waits for the notice must get one, whatever became of the blocks.
            self._attempt(self._publish, job)
            self._attempt(self._send_published, job)
            if self._jobs.empty():  # the workers that wait for the blocks come before the next ones' room
                self._attempt(self._prepare, job)

    def _attempt(self, step: Callable[[_Job], None], job: _Job) -> None:
        try:
            step(job)
        except Exception:  # the thread's root: a failed publish is a future miss, not the end of publishing
            logger.exception("publish_failed step=%s", step.__name__)

    def _publish(self, job: _Job) -> None:
        if len(job.staged.slots) and (delay_s := self._faults.delay_s("kv_publish.delay_s")):
            time.sleep(delay_s)
        outcomes = self._store.commit(job.staged)
        self._store.announce()  # other nodes may wait for them
        stored, no_room = (outcomes.count(outcome) for outcome in (PutOutcome.STORED, PutOutcome.NO_ROOM))
        self._totals.published_blocks += stored
        self._totals.published_bytes += stored * self._tensors.block_bytes
        with self._lock:
            self._totals.unstored_blocks += no_room

    def _send_published(self, job: _Job) -> None:
        if job.prompt_hashes is not None:
            blocks = leading_count(self._store.contains(self._namespace, job.prompt_hashes))
            payload_bytes = blocks * self._tensors.block_bytes
            self._notices.send(Notice(kind="published", tag=job.tag, blocks=blocks, payload_bytes=payload_bytes, totals=self._totals))

    def _prepare(self, job: _Job) -> None:
        self._store.prepare(self._tensors.block_bytes, self._granted_blocks)
        self._totals.evicted_blocks = self._store.evicted_blocks
