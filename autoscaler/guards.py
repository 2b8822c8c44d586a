"""What holds a change back: what was wanted a while ago, the survivors' load, starts that fail.

Must not decide a count: `sizing.py` and `core.py` do.
"""

from collections import deque
from collections.abc import Callable

from autoscaler.config import ScalerConfig
from autoscaler.plan import choose_victims
from autoscaler.sizing import PoolView


class WindowExtreme:
    """The largest (`pick=max`) or smallest (`pick=min`) count in force at any moment of the last `window_s`.

    A count is in force until the next one is added. Keeps at most as many entries as there are different counts.
    """

    def __init__(self, window_s: float, pick: Callable[[int, int], int]) -> None:
        self._window_s = window_s
        self._pick = pick
        self._entries: deque[tuple[float, int]] = deque()  # when last in force, and the count; the extreme first
        self._in_force: int | None = None

    def add(self, count: int, now_s: float) -> int:
        """Puts `count` in force and answers the extreme; O(1) on average."""
        for in_force in (self._in_force, count):
            if in_force is None:
                continue
            while self._entries and self._pick(self._entries[-1][1], in_force) == in_force:
                self._entries.pop()
            self._entries.append((now_s, in_force))
        self._in_force = count
        while self._entries[0][0] <= now_s - self._window_s:
            self._entries.popleft()
        return self._entries[0][1]


class BackOff:
    """Waits after starts that failed: `first_s`, doubling to `max_s`, until one succeeds."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._wait_s = 0.0
        self._until_s = 0.0

    def failed(self, now_s: float) -> None:
        """A start failed. Failures during a wait belong to the starts before it, and do not make it longer."""
        if self.left_s(now_s) > 0.0:
            return
        self._wait_s = min(max(2.0 * self._wait_s, self._first_s), self._max_s)
        self._until_s = now_s + self._wait_s

    def succeeded(self) -> None:
        """A start succeeded, or none is wanted: the next failure is the first."""
        self._wait_s = 0.0

    def left_s(self, now_s: float) -> float:
        """Seconds in which no replica may be started; 0 or less where one may."""
        return self._until_s - now_s if self._wait_s else 0.0


def survivors_cope(view: PoolView, *, wanted: int, replicas: int, config: ScalerConfig) -> bool:
    """Whether a pool of `wanted` replicas may be reduced to `replicas`, at least 1. O(n log n).

    The N/(N-1) rule (Dynamo's load planner): each survivor takes over its share, and must stay at `consolidation_fraction` of the
    limits that make the pool grow. Work on draining replicas and in the routers is shared out too.
    """
    if replicas >= len(view.ready):
        return True  # only replicas that serve nobody go
    if view.live > wanted:
        return False  # the last step down is not done yet
    victims = choose_victims(view.ready, len(view.ready) - replicas)
    survivors = [replica for replica in view.ready if replica.replica_id not in victims]
    growth = len(view.ready) / replicas
    shared_load = sum(replica.load_fraction for replica in view.draining) / replicas
    shared_backlog_s = (view.queued_work_s + sum(replica.backlog_s for replica in view.draining)) / replicas
    max_load = config.consolidation_fraction * config.scale_up_load_fraction
    max_backlog_s = config.consolidation_fraction * config.scale_up_backlog_s
    return all(
        replica.load_fraction * growth + shared_load <= max_load and replica.backlog_s * growth + shared_backlog_s <= max_backlog_s
        for replica in survivors
    )
