"""Carries out the copies of hot prefixes that the core asks for: one call of `Store.Copy` each, beside the requests.

Must not decide: what is copied, where to, and how many at once is the core's (`hot_prefixes.py`). No request waits for one.
"""

import asyncio
import logging
from typing import Protocol

import grpc.aio

from kv_transfer.peer_client import copy_blocks
from router.instructions import CopyPrefix
from router.shell import RouterShell
from tandem.errors import Code, TandemError

logger = logging.getLogger(__name__)

_COPY_S = 30.0  # what a store service gives a call at most; 200 MB/s are 6 GB


class StoreLinks(Protocol):
    """How to reach store services: `router.stores.Stores`."""

    def reach(self, node: str) -> tuple[grpc.aio.Channel, str] | None:
        """A channel to the node's store service, and its address; None where it has no lease."""


class PrefixCopies:
    """Run `run` in a task. A copy that fails is counted and told to the core, which leaves that node alone for a while."""

    def __init__(self, shell: RouterShell, stores: StoreLinks, *, timeout_s: float = _COPY_S) -> None:
        self._shell = shell
        self._stores = stores
        self._timeout_s = timeout_s
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Takes the core's copies until cancelled, which ends them."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._shell.on_copy = self._begin
            await asyncio.Event().wait()

    def _begin(self, copy: CopyPrefix) -> None:
        assert self._group is not None
        self._group.create_task(self._carry_out(copy), name=f"copy a prefix to {copy.target_node}")

    async def _carry_out(self, copy: CopyPrefix) -> None:
        outcome, copied_blocks = "failed", 0
        try:
            outcome, copied_blocks = await self._copy(copy)
        except Exception:
            logger.exception("prefix_copy_failed request_id=%s node=%s", copy.request_id, copy.target_node)
            self._shell.metrics.task_failures.labels("prefix_copy").inc()
        finally:
            self._shell.prefix_copied(copy, outcome, copied_blocks)

    async def _copy(self, copy: CopyPrefix) -> tuple[str, int]:
        """How it ended, as the metric has it, and blocks that came."""
        source, target = self._stores.reach(copy.source_node), self._stores.reach(copy.target_node)
        if source is None or target is None:
            return "failed", 0
        try:
            answer = await copy_blocks(target[0], copy.namespace, copy.block_hashes, source[1], timeout_s=self._timeout_s)
        except TandemError as error:
            logger.warning(
                "prefix_copy_failed request_id=%s source=%s node=%s error=%s",
                copy.request_id,
                copy.source_node,
                copy.target_node,
                error.message,
            )
            return "timeout" if error.code is Code.DEADLINE_EXCEEDED else "failed", 0
        is_whole = answer.held_blocks >= len(copy.block_hashes)
        return "copied" if is_whole else "partial", answer.copied_blocks
