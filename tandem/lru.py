"""A mapping with a bound that makes what it lacks and forgets what was used longest ago.

Must not know what it holds.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `limit` values by key. All operations are O(1)."""

    def __init__(self, limit: int, make: Callable[[], V]) -> None:
        if limit < 1:
            raise ValueError(f"a bound must be at least 1, got {limit}")
        self._limit = limit
        self._make = make
        self._values: OrderedDict[K, V] = OrderedDict()
        self.evicted_total = 0

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[K]:
        return iter(self._values)

    def get(self, key: K) -> V | None:
        """The value, now the last used; None where there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def obtain(self, key: K) -> V:
        """The value, now the last used; made where there is none."""
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = self._make()
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
                self.evicted_total += 1
        else:
            self._values.move_to_end(key)
        return value

    def items(self) -> Iterator[tuple[K, V]]:
        """Key and value as they are now, the one used longest ago first: a scrape's thread may look while others use them."""
        return iter(list(self._values.items()))

    def discard(self, key: K) -> None:
        """Forgets the value; no harm where there is none."""
        self._values.pop(key, None)
