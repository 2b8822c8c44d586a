"""The lock under which an arena's structure changes: who holds which slot, the index, the slabs.

A file lock, so that the kernel frees it with its holder. Held for tens of microseconds, never over a copy, and never waited for in an
engine's step.
"""

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE_NAME = "lock"
_RETRY_S = 20e-6
_PATIENCE_S = 1.0  # while others get it and give it back
_TURNS_BYTES = 8  # of the file: how often the lock was had, so that those who wait tell a busy lock from a holder that is stopped


class ArenaLock:
    """Between processes by flock, between threads of one by a lock of Python's. Do not share it over a fork."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._thread_lock = threading.Lock()
        os.ftruncate(self._descriptor, _TURNS_BYTES)
        self._turns = memoryview(mmap.mmap(self._descriptor, _TURNS_BYTES)).cast("Q")

    def acquire(self, timeout_s: float, patience_s: float = _PATIENCE_S) -> bool:
        """Whether it was had. A holder that is stopped costs `timeout_s`; while others take turns it is waited for up to `patience_s`."""
        if self._try():
            return True
        started_s = moved_s = time.monotonic()
        turn = self._turns[0]
        while not self._try():
            now_s = time.monotonic()
            if self._turns[0] != turn:
                turn, moved_s = self._turns[0], now_s
            if now_s - moved_s > timeout_s or now_s - started_s > max(timeout_s, patience_s):
                return False
            time.sleep(_RETRY_S)
        return True

    def release(self) -> None:
        """By its holder."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._thread_lock.release()

    @contextmanager
    def held(self, timeout_s: float, patience_s: float = _PATIENCE_S) -> Iterator[bool]:
        """The same for a block; whether it was had."""
        is_had = self.acquire(timeout_s, patience_s)
        try:
            yield is_had
        finally:
            if is_had:
                self.release()

    def _try(self) -> bool:
        if not self._thread_lock.acquire(blocking=False):
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._thread_lock.release()
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._turns[0] = (self._turns[0] + 1) % (1 << 64)
        return True

    def close(self) -> None:
        """Closes the file; once only."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
