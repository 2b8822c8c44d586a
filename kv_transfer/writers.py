"""Who writes into an arena: a number for each process, held by a file lock, so that a dead writer's slots are known for what they are.

Numbers are taken and looked up under the arena's lock only.
"""

import fcntl
import os
from pathlib import Path

from tandem.tether import is_held

_FOLDER = "writers"
_MAX_WRITERS = 1023  # a thousand processes on one node; the column has 16 bits


class Writers:
    """The writers of the arena in `folder`; this process is one of them from `number` on until `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._descriptor: int | None = None
        self._number = 0

    @property
    def has_number(self) -> bool:
        """Whether `number` has been called."""
        return self._descriptor is not None

    def number(self) -> int:
        """This process's number, taken at the first call; 0 where there is none left. A dead one may have had it before."""
        if self._descriptor is None:
            for number in range(1, _MAX_WRITERS + 1):
                descriptor = os.open(self._folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                else:
                    self._descriptor, self._number = descriptor, number
                    break
        return self._number

    def is_alive(self, number: int) -> bool:
        """Whether that writer lives."""
        return is_held(self._folder / str(number))

    def close(self) -> None:
        """Gives the number back; its slots are to be given back before."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._number = None, 0
