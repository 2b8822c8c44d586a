"""How fast this router's queue of one model moves, in seconds of work per second, and so how long a wait in it is.

Must not know the queue's order or other routers: what they take shows in the rate.
"""

import math

_MEMORY_S = 10.0  # a scaling step or a burst of another router is seen in about this
_PRIOR_WEIGHT_S = 0.25  # of the caller's guess, against seconds of waiting seen


class DrainRate:
    """EWMA of work dispatched while something waited, over the time that something waited.

    Only that time counts: without a queue the rate of dispatch is the rate of arrival. A queue that stands still counts as it stands.
    """

    def __init__(self) -> None:
        self._work_s = 0.0
        self._waited_s = 0.0
        self._is_waiting = False
        self._is_learnt: bool | None = None  # None: nothing was dispatched yet
        self._last_s: float | None = None

    def note(self, *, is_waiting: bool, now_s: float) -> None:
        """From now on requests wait, or none does."""
        self._advance(now_s)
        self._is_waiting = is_waiting

    def dispatched(self, work_s: float, now_s: float, *, is_guess: bool = False) -> None:
        """A request with so many predicted seconds of work has left the queue; call `note` once what is left is known.

        Guessed seconds are of another kind than learnt ones: the first of those ends what was measured, and guesses count no more.
        """
        self._advance(now_s)
        if is_guess and self._is_learnt:
            return
        if not is_guess and self._is_learnt is False:
            self._is_learnt, self._work_s, self._waited_s = True, 0.0, 0.0
            return
        self._is_learnt = not is_guess
        if self._is_waiting:
            self._work_s += work_s

    def rate(self, now_s: float, prior_rate: float) -> float:
        """Seconds of work dispatched per second; `prior_rate`, such as the number of replicas, where little was seen."""
        work_s, waited_s = self._at(now_s)
        return (work_s + _PRIOR_WEIGHT_S * prior_rate) / (waited_s + _PRIOR_WEIGHT_S)

    def wait_s(self, ahead_s: float, now_s: float, prior_rate: float) -> float:
        """Seconds until so many seconds of work have left the queue. `prior_rate` must be above 0."""
        return ahead_s / self.rate(now_s, prior_rate)

    def _at(self, now_s: float) -> tuple[float, float]:
        """Work and waiting time as remembered at `now_s`."""
        passed_s = 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)
        kept = math.exp(-passed_s / _MEMORY_S)
        waited_s = _MEMORY_S * (1.0 - kept) if self._is_waiting else 0.0
        return self._work_s * kept, self._waited_s * kept + waited_s

    def _advance(self, now_s: float) -> None:
        self._work_s, self._waited_s = self._at(now_s)
        self._last_s = now_s if self._last_s is None else max(now_s, self._last_s)
