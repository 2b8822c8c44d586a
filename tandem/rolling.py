"""Statistics of the last so many values: quantile and mean.

Must not know what the values are, nor any clock: a window is a number of values.
"""

import math
from bisect import bisect_left, insort
from collections import deque


class RollingQuantile:
    """Quantiles of the last `size` values. Adding is O(size) in memory moves, below 1 us for 500 values; asking is O(1)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Takes one more value; the oldest goes when there are more than `size`."""
        self._values.append(value)
        insort(self._sorted, value)
        if len(self._values) > self._size:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]

    def quantile(self, level: float) -> float:
        """The value that a further one of the same kind exceeds with probability 1 - level at most, where the window is long enough.

        The ceil((n + 1) * level)-th smallest of n, or the largest (split conformal prediction, Vovk et al. 2005).
        Raises ValueError while there are none.
        """
        if not self._sorted:
            raise ValueError("no values yet")
        rank = math.ceil((len(self._sorted) + 1) * level)
        return self._sorted[min(max(rank, 1), len(self._sorted)) - 1]


class RollingMean:
    """Mean of the last `size` values, in O(1) amortised. The sum is made anew once per window, so that rounding does not pile up."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._sum = 0.0
        self._until_resum = size

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Takes one more value; the oldest goes when there are more than `size`."""
        self._values.append(value)
        self._sum += value
        if len(self._values) > self._size:
            self._sum -= self._values.popleft()
        self._until_resum -= 1
        if self._until_resum <= 0:
            self._sum = math.fsum(self._values)
            self._until_resum = self._size

    @property
    def mean(self) -> float:
        """The mean; 0 while there are no values."""
        return self._sum / len(self._values) if self._values else 0.0
