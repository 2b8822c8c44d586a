"""Brings an event log to the disk, off the event loop and within bounds.

Must not know what is in a record. A log that ends early (full, a slow disk, a disk error) is a line in the router's own log, no more.
"""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

from tandem.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_LOG_BYTES = 2**30  # some million requests
_WRITE_EACH_S = 0.1
_MAX_UNWRITTEN_BYTES = 32 * 2**20  # and as much again in the thread's hands
_MAX_NAMES = 10_000


class EventLogFile:
    """An open log: `path` is the name it got. `add` takes records on the event loop, `write_forever` brings them to the disk in a thread.

    It ends, with one line, at `max_bytes` or where the disk does not keep up: a log with gaps would replay to nothing.
    """

    def __init__(self, path: Path, header: bytes, *, max_bytes: int = DEFAULT_LOG_BYTES) -> None:
        self.path, self._descriptor = _create(path)
        self._max_bytes = max_bytes
        self._records = [header]
        self._unwritten_bytes = self.num_bytes = len(header)
        self._is_open = True
        self._has_failed = False
        logger.info("event_log_begun path=%s max_bytes=%d", self.path, max_bytes)

    @property
    def is_open(self) -> bool:
        """Whether events are still taken."""
        return self._is_open

    def add(self, record: bytes) -> None:
        """The next record; nothing once the log has ended."""
        if not self._is_open:
            return
        if self.num_bytes + len(record) > self._max_bytes:
            self._end("full")
        elif self._unwritten_bytes + len(record) > _MAX_UNWRITTEN_BYTES:
            self._end("disk_too_slow")
        else:
            self._records.append(record)
            self.num_bytes += len(record)
            self._unwritten_bytes += len(record)

    async def write_forever(self) -> None:
        """Writes what there is ten times a second, until cancelled."""
        while True:
            await asyncio.sleep(_WRITE_EACH_S)
            writing = asyncio.create_task(asyncio.to_thread(self._write, self._take()), name="event log write")
            try:
                await asyncio.shield(writing)
            finally:
                await writing  # what follows comes after it in the file too

    def close(self) -> None:
        """Writes the rest; after `write_forever` has ended."""
        self._write(self._take())
        self._is_open = False
        os.close(self._descriptor)

    def _take(self) -> list[bytes]:
        records, self._records, self._unwritten_bytes = self._records, [], 0
        return records

    def _write(self, records: list[bytes]) -> None:
        if self._has_failed:
            return
        data = b"".join(records)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._has_failed = True
            self._end(error.strerror or "disk_error")

    def _end(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False
            logger.warning("event_log_ended path=%s bytes=%d reason=%s", self.path, self.num_bytes, reason)


def _create(path: Path) -> tuple[Path, int]:
    """PATH, or the first of PATH.1, PATH.2, ... that is not there: nothing is overwritten. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in range(_MAX_NAMES):
            name = path if number == 0 else path.with_name(f"{path.name}.{number}")
            with suppress(FileExistsError):
                return name, os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the event log {path}: {error.strerror}") from error
    raise ConfigError(f"there are {_MAX_NAMES} event logs beside {path}: move some away")
