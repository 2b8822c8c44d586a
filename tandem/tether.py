"""A file lock that says "the owner lives": held by a supervisor, watched by what it started, freed by the kernel with its death.

Needs no connection, and a supervisor's successor takes it over. One file per node.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 2.0
GRACE_S = 60.0  # reconcile replaces a node agent in about 2 s; with a new Ray head it comes in 12 to 30


class Tether:
    """The watching side. `is_cut` once nobody has held the lock for `grace_s`."""

    def __init__(self, path: Path, *, grace_s: float = GRACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._grace_s = grace_s
        self._clock = clock
        self._held_s = clock()

    def is_cut(self) -> bool:
        """Whether the owner has been gone for the grace time. Does a few system calls."""
        now_s = self._clock()
        if is_held(self._path):
            self._held_s = now_s
        return now_s - self._held_s > self._grace_s


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def hold(path: Path) -> int | None:
    """Takes the lock for this process's life; its descriptor, or None where another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + 0.1
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a watcher looks for a few microseconds
            if time.monotonic() > deadline_s:
                os.close(descriptor)
                return None
            time.sleep(0.005)
        else:
            return descriptor
