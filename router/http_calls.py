"""The HTTP calls in service: what is kept of each, how long they may take, and how they end when the router stops.

Must not answer them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from router.event_stream import EventStream
from tandem.domain import DEFAULT_TENANT
from tandem.errors import DeadlineError, Reason, UnavailableError

_LAST_WORDS_S = 0.5  # after the grace of 2 s; a cluster that ends kills its routers after 3 s


@dataclass(slots=True)
class HttpCall:
    """One call: its id, whose it is, and its event stream where it is answered by one. `is_client_gone`: so a write has shown."""

    request_id: str
    tenant: str = DEFAULT_TENANT
    events: EventStream | None = None
    is_client_gone: bool = False


HTTP_CALL = web.RequestKey("http_call", HttpCall)


class HttpCalls:
    """The calls that hold work. Belongs to one event loop."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._is_stopping = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @asynccontextmanager
    async def limit(self, seconds: float | None) -> AsyncIterator[None]:
        """Ends what runs inside after `seconds` with DeadlineError, or with UnavailableError when the router stops."""
        if self._is_stopping:
            raise _stopping()
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._limits.add(limit)
                self._is_idle.clear()
                try:
                    yield
                finally:
                    self._limits.discard(limit)
                    if not self._limits:
                        self._is_idle.set()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise (_stopping() if self._is_stopping else DeadlineError("response")) from error

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets those in service end within `grace_s`, then ends them."""
        self._is_stopping = True
        if not await self._idle_within(grace_s):
            for limit in self._limits:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())
            await self._idle_within(_LAST_WORDS_S)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._is_idle.wait()
        except TimeoutError:
            return self._is_idle.is_set()
        return True


def _stopping() -> UnavailableError:
    return UnavailableError("the router is stopping", reason=Reason.DRAINING, retry_after_s=1.0)
