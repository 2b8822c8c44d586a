"""Server-sent events on one HTTP answer: the headers go out with the first event, and every write has a bound.

Must not know what events mean. Several tasks may send: an event is never cut in two.
"""

import asyncio
from collections.abc import Mapping

from aiohttp import web

from tandem.errors import CancelledRequestError, Reason

_LAST_WORD_S = 1.0


class EventStream:
    """The answer to `request` as a stream of events.

    Methods that send raise CancelledRequestError where the client has gone, or has taken nothing for `stall_s`.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str], stall_s: float) -> None:
        self._request = request
        self._stall_s = stall_s
        self._started: asyncio.Future[None] | None = None
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        )

    @property
    def has_started(self) -> bool:
        """Whether the status is out: an error can only be an event then."""
        return self._started is not None

    async def send(self, payload: bytes) -> None:
        """Sends one event; `payload` has no line break."""
        await self._write(b"data: %b\n\n" % payload, self._stall_s)

    async def comment(self, payload: bytes) -> None:
        """Sends a line that clients pass over."""
        await self._write(b": %b\n\n" % payload, self._stall_s)

    async def break_off(self, payload: bytes) -> None:
        """Sends a last event where the client still reads, then closes the connection."""
        self.response.force_close()
        try:
            await self._write(b"data: %b\n\n" % payload, _LAST_WORD_S)
        except CancelledRequestError:
            self.abort()

    def abort(self) -> None:
        """Closes the connection without another byte."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _write(self, data: bytes, stall_s: float) -> None:
        try:
            async with asyncio.timeout(stall_s):
                await self._start()
                await self.response.write(data)
        except TimeoutError as error:
            raise CancelledRequestError(f"the client has read nothing for {stall_s:g} s", reason=Reason.CLIENT_STALLED) from error
        except ConnectionError as error:
            raise CancelledRequestError from error

    async def _start(self) -> None:
        """Sends the headers once; who comes second waits until they are out."""
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            try:
                await self.response.prepare(self._request)
            finally:
                self._started.set_result(None)
        elif not self._started.done():
            await asyncio.shield(self._started)
