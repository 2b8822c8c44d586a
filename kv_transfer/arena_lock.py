"""The lock under which an arena's structure changes: who holds which slot, the index, the slabs.

A file lock, so that the kernel frees it with its holder. Held for tens of microseconds, never over a copy, and never waited for in an
engine's step.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE_NAME = "lock"
_RETRY_S = 20e-6


class ArenaLock:
    """Between processes by flock, between threads of one by a lock of Python's. Do not share it over a fork."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._thread_lock = threading.Lock()

    def acquire(self, timeout_s: float) -> bool:
        """Whether it was had within `timeout_s`: a holder that is stopped must not stop others."""
        deadline_s = time.monotonic() + timeout_s
        if not self._thread_lock.acquire(timeout=timeout_s):
            return False
        is_had = False
        try:
            is_had = self._try_flock(deadline_s)
        finally:
            if not is_had:
                self._thread_lock.release()
        return is_had

    def release(self) -> None:
        """By its holder."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._thread_lock.release()

    @contextmanager
    def held(self, timeout_s: float) -> Iterator[bool]:
        """The same for a block; whether it was had."""
        is_had = self.acquire(timeout_s)
        try:
            yield is_had
        finally:
            if is_had:
                self.release()

    def _try_flock(self, deadline_s: float) -> bool:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(_RETRY_S)
            else:
                return True

    def close(self) -> None:
        """Closes the file; once only."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
