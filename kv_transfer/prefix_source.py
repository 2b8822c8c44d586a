"""A replica's side of prefetching: before a prompt goes to the engine, has the node's store service bring its prefix into the arena.

Costs a call to a process of this node; used where there is more than one node, or a tier below the arena. Never fails a request.
"""

import logging
import time
from collections.abc import Callable, Sequence

import grpc.aio

from kv_transfer.manifest import hash_in_slices
from kv_transfer.peer_client import prefetch_blocks
from tandem.domain import EngineInfo, Namespace
from tandem.errors import DeadlineError, TandemError

logger = logging.getLogger(__name__)

_MIN_BLOCKS = 2  # fewer are computed sooner
_PAUSE_S = 5.0  # after a failure: a service that hangs costs a few requests a wait, not each
_DEADLINE_STEP_S = 0.002  # gRPC carries a deadline in whole milliseconds, rounded up, and the answer has to come back


class PrefixSource:
    """Asks the store service at `address`; `wait_s` bounds what one prompt waits."""

    def __init__(
        self, engine: EngineInfo, namespace: Namespace, channels: Callable[[str], grpc.aio.Channel], address: str, *, wait_s: float
    ) -> None:
        self._engine = engine
        self._namespace = namespace
        self._channels = channels
        self._address = address
        self._wait_s = wait_s
        self._paused_until_s = 0.0

    async def bring(self, token_ids: Sequence[int], cache_salt: str, remaining_s: float | None) -> int:
        """Has the leading full blocks brought here, within the request's time; how many are in the arena then, 0 where nobody knows."""
        blocks = (len(token_ids) - 1) // self._engine.block_size_tokens  # one token is always computed
        if blocks < _MIN_BLOCKS or time.monotonic() < self._paused_until_s:
            return 0
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s - _DEADLINE_STEP_S
        hashes = await hash_in_slices(token_ids, self._engine.block_size_tokens, cache_salt)
        timeout_s = self._wait_s if deadline_s is None else min(self._wait_s, deadline_s - time.monotonic())
        if timeout_s <= 0.0:
            return 0
        try:
            return await prefetch_blocks(self._channels(self._address), self._namespace, hashes[:blocks], timeout_s=timeout_s)
        except TandemError as error:
            logger.warning("prefetch_failed error=%r", error)
            # A request that had hardly any time left says nothing of the service.
            if not isinstance(error, DeadlineError) or timeout_s == self._wait_s:
                self._paused_until_s = time.monotonic() + _PAUSE_S
            return 0
