"""Ids of requests that ended a moment ago, with their last attempts: stamps of theirs may still come when an id is used again.

Must not know what a request is. Bounded: beyond, the oldest are forgotten, which costs a wrong count for a moment.
"""

from collections import OrderedDict

from tandem.domain import RequestId

_MAX_IDS = 10_000  # 2,000 requests/s with a settle time of 5 s


class RecentIds:
    """Remembers each for `settle_s` seconds."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._ended: OrderedDict[RequestId, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ended)

    def last_attempt(self, request_id: RequestId) -> int:
        """Of the request that had the id last; 0 where none is remembered."""
        return self._ended.get(request_id, (0, 0.0))[0]

    def begun(self, request_id: RequestId) -> None:
        """The id is in use again."""
        self._ended.pop(request_id, None)

    def ended(self, request_id: RequestId, attempt: int, now_s: float) -> None:
        """Its request has ended."""
        self._ended[request_id] = (attempt, now_s)
        if len(self._ended) > _MAX_IDS:
            self._ended.popitem(last=False)

    def expire(self, now_s: float) -> None:
        """Forgets those of longer ago than the settle time."""
        while self._ended:
            request_id, (_, ended_s) = next(iter(self._ended.items()))
            if now_s - ended_s < self._settle_s:
                return
            del self._ended[request_id]
