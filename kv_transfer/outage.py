"""What a store does about a disk or a server in trouble: says it once, leaves it alone for a while, then lets one caller try.

Must not know what the trouble is: the store gives its words.
"""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0


class Outage:
    """Trouble with one thing, if there is any. Pauses start at `pause_s` and double to 30 s. Safe for threads."""

    def __init__(self, what: str, *, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.error = ""  # what is wrong; empty while all is well
        self._what = what
        self._clock = clock
        self._first_pause_s = pause_s
        self._pause_s = pause_s
        self._until_s = 0.0
        self._is_tried = False
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether there is trouble and nobody may try just now."""
        return bool(self.error) and self._clock() < self._until_s

    def allows(self) -> bool:
        """Whether the caller may try: anybody while all is well, else one caller after each pause."""
        if not self.error:
            return True
        with self._lock:
            if self.is_on:
                return False
            self._until_s = self._clock() + self._pause_s
            self._is_tried = True
            return True

    def begin(self, error: str) -> None:
        """It failed: one log line for each outage, a longer pause after each vain try."""
        with self._lock:
            if not self.error:
                self._pause_s = self._first_pause_s
                logger.warning("kv_tier_trouble tier=%s error=%s", self._what, error)
            elif self._is_tried:
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            else:  # somebody who had asked before the first knew
                return
            self._is_tried = False
            self.error = error
            self._until_s = self._clock() + self._pause_s

    def end(self) -> None:
        """It worked."""
        if self.error:
            with self._lock:
                self.error = ""
                self._is_tried = False
                logger.warning("kv_tier_well tier=%s", self._what)
