"""A request's deadline as the time that is left. On the wire goes the remaining time, never a time stamp."""

import time

from tandem.errors import DeadlineError


class Deadline:
    """Seconds left of a request, by the monotonic clock of this process."""

    def __init__(self, remaining_s: float | None) -> None:
        self._ends_s = None if remaining_s is None else time.monotonic() + remaining_s

    def remaining_s(self, stage: str) -> float | None:
        """Seconds left; None: no deadline. Raises DeadlineError where none are left."""
        if self._ends_s is None:
            return None
        remaining_s = self._ends_s - time.monotonic()
        if remaining_s <= 0.0:
            raise DeadlineError(stage)
        return remaining_s
