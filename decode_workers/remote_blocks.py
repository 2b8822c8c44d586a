"""Hand-off between nodes: has this node's store service copy a prompt's blocks from the prefill worker's node.

Must not fail a request or hold it longer than its bound: what has not come is computed here, and counted.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from decode_workers.handoff import Channels
from kv_transfer.manifest import hash_in_slices
from kv_transfer.peer_client import copy_blocks
from tandem.domain import BlockHash, EngineInfo, PlannedWorker, Request
from tandem.engine.base import Engine
from tandem.errors import DeadlineError, TandemError
from tandem.rpc import Deadline
from tandem.telemetry import RemoteKvMetrics
from tandem.worker_state import WorkerState

logger = logging.getLogger(__name__)

# A store that took this long to fail is not asked again for a while: one that hangs costs a few requests a wait, not each.
_SLOW_FAILURE_S = 0.5
_PAUSE_S = 5.0
_MAX_PAUSED = 256
_FOLLOW_S = 30.0  # of a prefill; what comes later is asked for at its end


class RemoteBlocks:
    """The asking side on one replica. `wait_s` bounds what one request waits, counted from its first token."""

    def __init__(self, engine: Engine, state: WorkerState, channels: Channels, metrics: RemoteKvMetrics, *, wait_s: float) -> None:
        self._engine = engine
        self._state = state
        self._channels = channels
        self._wait_s = wait_s
        self._paused_until_s: dict[str, float] = {}
        self.metrics = metrics

    def start(self, request: Request, worker: PlannedWorker, deadline: Deadline) -> "RemoteHandoff | None":
        """Begins a hand-off as `worker` begins to prefill; None where nothing is to be copied: one node, or a node without a store.

        The caller closes it.
        """
        lease, source = self._state.lease, worker.store_address
        if worker.node == lease.node or source in ("", lease.store_address) or not lease.store_address:
            return None
        return RemoteHandoff(self, request, self._engine.info, source, deadline, wait_s=self._wait_s)

    async def ask(self, hashes: Sequence[BlockHash], source: str, timeout_s: float, *, wait_s: float = 0.0) -> tuple[str, int]:
        """Has the leading blocks copied from the store at `source`: the outcome, and how many are known to be here afterwards.

        Those that it does not hold yet are waited for, up to `wait_s`.
        """
        started_s, lease = time.monotonic(), self._state.lease
        if started_s < self._paused_until_s.get(source, 0.0):
            return "paused", 0
        try:
            copied = await copy_blocks(
                self._channels(lease.store_address), lease.namespace, hashes, source, timeout_s=timeout_s, wait_s=wait_s
            )
        except TandemError as error:
            logger.warning("remote_copy_failed source=%s error=%r", source, error)
            if time.monotonic() - started_s >= _SLOW_FAILURE_S:
                self._pause(source)
            return "timeout" if isinstance(error, DeadlineError) else "failed", 0
        self.metrics.copied_blocks.inc(copied.copied_blocks)
        return "copied" if copied.held_blocks >= len(hashes) else "partial", copied.held_blocks

    def _pause(self, source: str) -> None:
        if len(self._paused_until_s) >= _MAX_PAUSED:
            self._paused_until_s.clear()
        self._paused_until_s[source] = time.monotonic() + _PAUSE_S


class RemoteHandoff:
    """One request's blocks on their way from the store at `source`, while they are being computed there.

    Once they are there nothing is waited for beyond `wait_s` or the deadline.
    """

    def __init__(
        self, remote: RemoteBlocks, request: Request, engine: EngineInfo, source: str, deadline: Deadline, *, wait_s: float
    ) -> None:
        self.source = source
        self._remote = remote
        self._deadline = deadline
        self._wait_s = wait_s
        token_ids = (*request.prompt_token_ids, *request.resume_token_ids)
        self._hashing = asyncio.create_task(hash_in_slices(token_ids, engine.block_size_tokens, request.cache_salt), name="hash-prompt")
        self._coming = asyncio.create_task(self._follow(), name="copy-chunks")

    async def _follow(self) -> None:
        """Has each chunk copied as it is published."""
        hashes = await asyncio.shield(self._hashing)
        if hashes:
            await self._remote.ask(hashes, self.source, self._time_left_s(_FOLLOW_S), wait_s=_FOLLOW_S)

    async def finish(self, published_blocks: int | None) -> None:
        """Waits for the leading `published_blocks`, or for what there is of the prompt where that is not known.

        Raises DeadlineError where the request's deadline has passed, and nothing else.
        """
        started_s = time.monotonic()
        hashes = await self._hashing
        if published_blocks is None or published_blocks < len(hashes):
            self._coming.cancel()  # it would wait for what does not come
            await asyncio.gather(self._coming, return_exceptions=True)
        wanted = hashes[:published_blocks]
        if not wanted:
            return
        time_left_s = self._time_left_s(self._wait_s)
        outcome, held_blocks = await self._remote.ask(wanted, self.source, time_left_s) if time_left_s > 0.0 else ("timeout", 0)
        metrics = self._remote.metrics
        metrics.copies.labels(outcome).inc()
        metrics.recomputed_blocks.inc(len(wanted) - held_blocks)
        metrics.copy.observe(time.monotonic() - started_s)

    def _time_left_s(self, limit_s: float) -> float:
        remaining_s = self._deadline.remaining_s("transfer")
        return limit_s if remaining_s is None else min(limit_s, remaining_s)

    async def aclose(self) -> None:
        """Ends what still runs."""
        self._hashing.cancel()
        self._coming.cancel()
        await asyncio.gather(self._hashing, self._coming, return_exceptions=True)
