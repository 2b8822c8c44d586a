"""Bodies of HTTP requests: read within a time and a bound on all bytes being read, parsed where they block nobody for long.

Must not know what a body means.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import web

from tandem.errors import InvalidRequestError, OverloadedError, Reason

MAX_BODY_BYTES = 16 * 2**20
MAX_BODIES_BYTES = 4 * MAX_BODY_BYTES  # being read or parsed; parsed, token ids take about ten times that for a moment
_LONG_BODY_BYTES = 64 * 2**10  # about 1 ms to parse
_BODY_S = 60.0
_RETRY_S = 1.0
T = TypeVar("T")


class HttpBodies:
    """The bodies that are being read. Belongs to one event loop."""

    def __init__(self, max_bytes: int = MAX_BODIES_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    async def parse(self, request: web.Request, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the request's JSON body; in a thread where it is long.

        Raises OverloadedError where too many bytes are being read, InvalidRequestError where the body cannot be decoded, aiohttp's errors
        where it is not JSON by its type, too large, or does not come, and whatever `parse` raises.
        """
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="the content type must be application/json")
        async with self._read(request) as body:
            return await asyncio.to_thread(parse, body) if len(body) > _LONG_BODY_BYTES else parse(body)

    @asynccontextmanager
    async def _read(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body, expanded. Counted as it comes, so that who sends nothing takes no room, and until the context ends."""
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                while chunk := await request.content.readany():
                    if len(body) + len(chunk) > MAX_BODY_BYTES:
                        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, len(body) + len(chunk))
                    if self._bytes + len(chunk) > self._max_bytes:
                        raise OverloadedError(f"bodies of more than {self._max_bytes} bytes are being read", retry_after_s=_RETRY_S)
                    body += chunk
                    self._bytes += len(chunk)
            yield bytes(body)
        except web.RequestPayloadError as error:
            raise InvalidRequestError("body", "cannot be decoded by its Content-Encoding", reason=Reason.BAD_BYTES) from error
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text=f"the body did not come within {_BODY_S:g} s") from error
        finally:
            self._bytes -= len(body)
