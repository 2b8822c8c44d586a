"""A bounded collection of step samples that keeps the mix of prefill and decode steps.

Must not judge samples. Whoever learns from them reads too seldom for all of them: a decode step may end every 2 ms.
"""

from collections import deque
from collections.abc import Iterable

from tandem.step_sample import StepSample


class StepReservoir:
    """At most `capacity` samples. What is too much leaves from the kind that has more of them, the oldest first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._prefill: deque[tuple[int, StepSample]] = deque()  # with its number, to restore the order
        self._decode: deque[tuple[int, StepSample]] = deque()
        self._number = 0

    def add(self, samples: Iterable[StepSample]) -> None:
        """Keeps new samples, the newest last."""
        for sample in samples:
            (self._prefill if sample.prefill_tokens else self._decode).append((self._number, sample))
            self._number += 1
            if len(self._prefill) + len(self._decode) > self._capacity:
                max(self._prefill, self._decode, key=len).popleft()

    def take(self) -> tuple[StepSample, ...]:
        """All samples in the order they came; empties the reservoir. O(n log n)."""
        kept = sorted((*self._prefill, *self._decode), key=lambda numbered: numbered[0])
        self._prefill.clear()
        self._decode.clear()
        return tuple(sample for _, sample in kept)
