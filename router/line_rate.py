"""How fast the lines of a pool's workers move, in seconds of predicted work per second, and so how long a wait in one is.

Must not know lines or workers: it is told how much work a worker did between two prompts that it took from a line in which others waited.
"""

import math

_MEMORY_S = 10.0  # a change, such as another router's burst on the same workers, is seen in about this
_PRIOR_WEIGHT_S = 0.25  # of a worker that does what was predicted, against seconds of waiting seen


class LineRate:
    """Work over time, both of the last seconds. 1 where workers do what was predicted, and no other router's prompts."""

    def __init__(self) -> None:
        self._work_s = 0.0
        self._waited_s = 0.0
        self._last_s = -math.inf

    def moved(self, work_s: float, waited_s: float, now_s: float) -> None:
        """A worker did so much of what it had been given in `waited_s`, during which its line was never empty."""
        kept = self._kept(now_s)
        self._work_s = self._work_s * kept + max(0.0, work_s)
        self._waited_s = self._waited_s * kept + max(0.0, waited_s)
        self._last_s = max(self._last_s, now_s)

    def wait_s(self, ahead_s: float, now_s: float) -> float:
        """Seconds until so many seconds of work in one line have been given to its worker."""
        kept = self._kept(now_s)
        return max(0.0, ahead_s) * (self._waited_s * kept + _PRIOR_WEIGHT_S) / (self._work_s * kept + _PRIOR_WEIGHT_S)

    def _kept(self, now_s: float) -> float:
        return math.exp(min(0.0, self._last_s - now_s) / _MEMORY_S)
