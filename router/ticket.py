"""One request's line between the core and the call that serves it.

Must not decide anything. Belongs to one event loop and one waiting task.
"""

import asyncio

from router.instructions import Dispatch
from tandem.domain import DEFAULT_TENANT, RequestId
from tandem.errors import CancelledRequestError, Reason, TandemError, UnavailableError
from tandem.ownership import Owner
from tandem.rpc import ResponseStream


class Ticket:
    """Brings dispatches and the final error to the waiting task, and breaks off its reading when the attempt's worker is lost."""

    def __init__(self, request_id: RequestId, tenant: str = DEFAULT_TENANT) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.owner = Owner()
        self.attempt = 0  # the one being served
        self._news: asyncio.Future[Dispatch | TandemError] = asyncio.get_running_loop().create_future()
        self._lost: dict[int, TandemError] = {}  # by attempt; at most one per dispatch
        self._stream: ResponseStream | None = None
        self._has_begun = False  # the attempt's stream has brought something
        self._waits_since_s: float | None = None

    def tell(self, news: Dispatch | TandemError) -> None:
        """The next attempt, or the end. Nothing where the waiting task has just been cancelled: it closes the ticket then."""
        if not self._news.done():
            self._news.set_result(news)

    async def next_dispatch(self) -> Dispatch:
        """Waits for the next attempt; raises the TandemError the request ended with."""
        news = await self._news
        self._news = asyncio.get_running_loop().create_future()
        if isinstance(news, TandemError):
            raise news
        self.attempt, self._stream, self._has_begun = news.attempt, None, False
        return news

    def abandon(self, attempt: int, error: TandemError) -> None:
        """The attempt's worker is lost: its reading ends with `error`, now or when it begins. A write to the client is not interrupted."""
        self._lost[attempt] = error
        if attempt == self.attempt and self._stream is not None:
            self._stream.cancel()

    def is_silent_since(self, time_s: float) -> bool:
        """Whether a stream that had begun has brought nothing since then, though it was waited for."""
        return self._has_begun and self._waits_since_s is not None and self._waits_since_s < time_s

    async def read(self, stream: ResponseStream, now_s: float) -> bytes | None:
        """The attempt's next message, None at its end. Raises the error of `abandon`, or the stream's own.

        A stream that the worker cancelled is a lost worker too; when the caller goes, this task itself is cancelled.
        """
        self._stream = stream
        if self.attempt in self._lost:
            raise self._lost[self.attempt]
        self._waits_since_s = now_s
        try:
            payload = await stream.read()
        except CancelledRequestError as error:
            lost = UnavailableError("the worker cancelled the request", reason=Reason.WORKER_LOST)
            raise self._lost.get(self.attempt, lost) from error
        except TandemError as error:
            if error.reason is not Reason.CONNECTION_LOST:
                raise
            raise UnavailableError(error.message, reason=Reason.WORKER_LOST) from error
        finally:
            self._waits_since_s = None
        self._has_begun = True
        return payload
