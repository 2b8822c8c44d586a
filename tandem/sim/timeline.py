"""Simulated time: what happens next. Same events in, same order out; ties go to what was planned first. Must not read a clock."""

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[..., None]


class Timeline:
    """A queue of actions by time. An action is called with its arguments at its moment; `now_s` is then that moment."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Action, tuple[object, ...]]] = []
        self._planned = 0

    def at(self, time_s: float, action: Action, *arguments: object) -> None:
        """Plans an action; one planned for the past happens now. O(log planned)."""
        self._planned += 1
        heappush(self._heap, (max(time_s, self.now_s), self._planned, action, arguments))

    def run(self) -> int:
        """Until nothing is planned; how many actions there were."""
        heap, done = self._heap, 0
        while heap:
            self.now_s, _, action, arguments = heappop(heap)
            action(*arguments)
            done += 1
        return done
