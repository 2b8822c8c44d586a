"""Hand-off between nodes: has this node's store service copy a prompt's blocks from the prefill worker's node.

Must not fail a request or hold it longer than its bound: what has not come is computed here, and counted.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from decode_workers.handoff import Channels, Prefilled
from kv_transfer.manifest import hash_in_slices
from kv_transfer.peer_client import copy_blocks
from tandem.domain import BlockHash, EngineInfo, Request
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


class RemoteBlocks:
    """The asking side on one replica. `wait_s` bounds what one request waits, counted from its first token."""

    def __init__(self, engine: Engine, state: WorkerState, channels: Channels, metrics: RemoteKvMetrics, *, wait_s: float) -> None:
        self._engine = engine
        self._state = state
        self._channels = channels
        self._wait_s = wait_s
        self._paused_until_s: dict[str, float] = {}
        self.metrics = metrics

    def start(self, request: Request, prefilled: Prefilled, deadline: Deadline) -> "RemoteHandoff | None":
        """Begins a hand-off once the first token is out; None where nothing is to be copied: one node, or a node without a store.

        The caller closes it.
        """
        lease, source = self._state.lease, prefilled.store_address
        if prefilled.worker.node == lease.node or source in ("", lease.store_address) or not lease.store_address:
            return None
        return RemoteHandoff(self, request, self._engine.info, source, deadline, wait_s=self._wait_s)

    async def ask(self, hashes: Sequence[BlockHash], source: str, timeout_s: float) -> tuple[str, int]:
        """Has the leading blocks copied from the store at `source`: the outcome, and how many are known to be here afterwards."""
        started_s, lease = time.monotonic(), self._state.lease
        if started_s < self._paused_until_s.get(source, 0.0):
            return "paused", 0
        try:
            copied = await copy_blocks(self._channels(lease.store_address), lease.namespace, hashes, source, timeout_s=timeout_s)
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
    """One request's blocks on their way from the store at `source`; nothing is waited for beyond `wait_s` or the deadline."""

    def __init__(
        self, remote: RemoteBlocks, request: Request, engine: EngineInfo, source: str, deadline: Deadline, *, wait_s: float
    ) -> None:
        self._remote = remote
        self._source = source
        self._deadline = deadline
        self._ends_s = time.monotonic() + wait_s
        token_ids = (*request.prompt_token_ids, *request.resume_token_ids)
        self._hashing = asyncio.create_task(hash_in_slices(token_ids, engine.block_size_tokens, request.cache_salt), name="hash-prompt")
        self._early: asyncio.Task[None] | None = None
        if len(token_ids) > engine.max_num_batched_tokens:
            # The chunks before the last one are in the store by now: they come while the last one is being published.
            self._early = asyncio.create_task(self._ask_early(), name="copy-early-chunks")

    async def _ask_early(self) -> None:
        hashes = await asyncio.shield(self._hashing)
        await self._remote.ask(hashes, self._source, self._time_left_s())

    async def finish(self, published_blocks: int | None) -> None:
        """Waits for the leading `published_blocks`, or for what there is of the prompt where that is not known.

        Raises DeadlineError where the request's deadline has passed, and nothing else.
        """
        hashes = (await self._hashing)[:published_blocks]
        if not hashes:
            return
        started_s, time_left_s = time.monotonic(), self._time_left_s()
        outcome, held_blocks = await self._remote.ask(hashes, self._source, time_left_s) if time_left_s > 0.0 else ("timeout", 0)
        metrics = self._remote.metrics
        metrics.copies.labels(outcome).inc()
        metrics.recomputed_blocks.inc(len(hashes) - held_blocks)
        metrics.copy.observe(time.monotonic() - started_s)

    def _time_left_s(self) -> float:
        left_s, remaining_s = self._ends_s - time.monotonic(), self._deadline.remaining_s("transfer")
        return left_s if remaining_s is None else min(left_s, remaining_s)

    async def aclose(self) -> None:
        """Ends what still runs."""
        tasks = [task for task in (self._hashing, self._early) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
