"""Histograms over logarithmic buckets that forget: masses, means, quantiles, and what is left beyond a point.

Must not know what is counted, nor any clock: forgetting is by observation.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

_RESCALE_ABOVE = 1e12  # far from the largest float, and far above the rounding error of the sums


def geometric_edges(lowest: float, highest: float, buckets: int) -> tuple[float, ...]:
    """`buckets` + 1 edges from `lowest` to `highest`, each the same factor above the one before."""
    factor = (highest / lowest) ** (1.0 / buckets)
    return tuple(lowest * factor**i for i in range(buckets + 1))


def whole_edges(highest: int, buckets: int) -> tuple[float, ...]:
    """At most `buckets` + 1 whole edges from 1 to `highest`: one per number at first, then geometric."""
    low, high = 1.0, float(highest)
    edges = [1.0, high]
    for _ in range(50):  # bisection: the least factor that needs no more buckets than there are
        factor = (low + high) / 2
        tried = [1.0]
        while tried[-1] < highest and len(tried) <= buckets:
            tried.append(min(float(highest), max(tried[-1] + 1, math.floor(tried[-1] * factor))))
        if tried[-1] >= highest:
            edges, high = tried, factor
        else:
            low = factor
    return tuple(edges)


class Distribution:
    """Masses by bucket and the sums of the values in each; a value lies in [edges[i], edges[i + 1]), spread evenly there.

    Values are taken as whole numbers where `is_whole`. Immutable by convention: its lists are not copied.
    """

    __slots__ = ("_edges", "_is_whole", "_masses", "_sums")

    def __init__(self, edges: Sequence[float], masses: list[float], sums: list[float], *, is_whole: bool = False) -> None:
        self._edges = edges
        self._masses = masses
        self._sums = sums
        self._is_whole = is_whole

    @property
    def mass(self) -> float:
        """The sum of all masses."""
        return sum(self._masses)

    def mean(self, limit: float = math.inf) -> float:
        """E[min(X, limit)]. Raises ZeroDivisionError without mass; O(buckets)."""
        if limit >= self._edges[-1]:
            return sum(self._sums) / sum(self._masses)
        return sum(min(total, mass * limit) for mass, total in zip(self._masses, self._sums, strict=True)) / sum(self._masses)

    def quantiles(self, *levels: float) -> list[float]:
        """The values below which so much of the mass lies, interpolated in their buckets; O(buckets) for all of them."""
        cumulative = list(accumulate(self._masses))
        return [self._at(cumulative, level * cumulative[-1]) for level in levels]

    def beyond(self, point: float) -> "Distribution | None":
        """The distribution of X given X >= point (mass not scaled up); None where hardly any mass lies there."""
        index = bisect_right(self._edges, point) - 1
        if index < 0:
            return self
        if index >= len(self._masses):
            return None
        upper = self._edges[index + 1]
        share = (upper - point) / (upper - self._edges[index])
        first = self._masses[index] * share
        masses = [first, *self._masses[index + 1 :]]
        if not sum(masses) > 1e-9 * self.mass:
            return None
        first_sum = self._sums[index] if share == 1.0 else first * (point + upper - self._is_whole) / 2
        edges = (point, *self._edges[index + 1 :])
        return Distribution(edges, masses, [first_sum, *self._sums[index + 1 :]], is_whole=self._is_whole)

    def _at(self, cumulative: list[float], target: float) -> float:
        index = min(bisect_left(cumulative, target), len(cumulative) - 1)
        while index and not self._masses[index]:  # rounding: the last mass of all lies lower
            index -= 1
        below = cumulative[index] - self._masses[index]
        lower, upper = self._edges[index], self._edges[index + 1]
        value = lower + (target - below) / self._masses[index] * (upper - lower) if self._masses[index] else lower
        if self._is_whole:
            return min(float(math.floor(value)), upper - 1)
        return min(max(value, lower), upper)


class LogHistogram:
    """Counts of values by bucket; each observation makes all earlier ones count `decay` times as much. Adding is O(1)."""

    def __init__(self, edges: Sequence[float], *, decay: float = 0.999, is_whole: bool = False) -> None:
        self._edges = edges
        self._decay = decay
        self._is_whole = is_whole
        self._masses = [0.0] * (len(edges) - 1)
        self._sums = [0.0] * (len(edges) - 1)
        self._unit = 1.0  # mass of the next observation: it grows, so that nothing else need shrink
        self._total = 0.0

    @property
    def weight(self) -> float:
        """Observations remembered, at most 1 / (1 - decay)."""
        return self._total / self._unit

    def observe(self, value: float) -> None:
        """Counts one value; beyond the edges it counts in the outermost bucket."""
        index = min(max(bisect_right(self._edges, value) - 1, 0), len(self._masses) - 1)
        self._unit /= self._decay
        self._masses[index] += self._unit
        self._sums[index] += self._unit * min(max(value, self._edges[0]), self._edges[-1])
        self._total += self._unit
        if self._unit > _RESCALE_ABOVE:
            self._masses = [mass / self._unit for mass in self._masses]
            self._sums = [total / self._unit for total in self._sums]
            self._total /= self._unit
            self._unit = 1.0

    def merge(self, other: "LogHistogram") -> None:
        """Counts all that `other` remembers as well, with its weight. Raises ValueError where the buckets differ; O(buckets)."""
        if tuple(self._edges) != tuple(other._edges):
            raise ValueError("histograms of different buckets cannot be merged")
        factor = self._unit / other._unit
        self._masses = [mine + factor * theirs for mine, theirs in zip(self._masses, other._masses, strict=True)]
        self._sums = [mine + factor * theirs for mine, theirs in zip(self._sums, other._sums, strict=True)]
        self._total += factor * other._total

    def quantile(self, level: float) -> float:
        """The value below which `level` of the weight lies; O(buckets)."""
        return Distribution(self._edges, self._masses, self._sums, is_whole=self._is_whole).quantiles(level)[0]


def mixture(parts: Sequence[tuple[LogHistogram, float]]) -> Distribution:
    """The mixture of histograms of the same buckets by their shares; those without weight or share are left out.

    Raises ValueError where nothing is left. O(parts x buckets).
    """
    used = [(histogram, share / histogram._total) for histogram, share in parts if share > 0.0 and histogram._total > 0.0]
    if not used:
        raise ValueError("nothing to mix")
    first, share = used[0]
    masses = [share * mass for mass in first._masses]
    sums = [share * total for total in first._sums]
    for histogram, share in used[1:]:
        masses = [have + share * mass for have, mass in zip(masses, histogram._masses, strict=True)]
        sums = [have + share * total for have, total in zip(sums, histogram._sums, strict=True)]
    return Distribution(first._edges, masses, sums, is_whole=first._is_whole)
