"""The files of the disk tier: segments that only grow and go as a whole, in a folder that one process at a time may use.

Must not decide what goes: `disk_store` does. Not safe for threads, readers apart.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from kv_transfer.disk_records import Record, scan, tombstone
from tandem.errors import ConfigError

FORMAT_FILE = "tandem-kv-format"
FORMAT = "tandem kv blocks, format 1"
_SEGMENT = re.compile(r"blocks-(\d{10})\.kv")

Buffer = bytes | bytearray | memoryview


@dataclass(slots=True, kw_only=True, eq=False)
class Segment:
    """One file. `end_bytes` is where its next record goes, `keys` are those of its records, in their order."""

    number: int
    path: Path
    end_bytes: int = 0
    keys: list[bytes] = field(default_factory=list)


class SegmentFolder:
    """The segments in `folder`, oldest first. Other files in there are left alone.

    Raises ConfigError where the folder cannot be used, another process has it, or it is of another format.
    """

    def __init__(self, folder: Path, *, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.segments: dict[int, Segment] = {}
        self.used_bytes = 0
        self.lost_bytes = 0  # behind the first bad record of a segment, when it was opened
        self._folder = folder
        self._active: Segment | None = None
        self._descriptor = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"cannot use {folder} for KV blocks ({error.strerror}): choose another folder") from error
        try:
            self._lock()
            self._check_format()
            numbers = (_SEGMENT.fullmatch(name) for name in os.listdir(folder))
            self._found = sorted(int(match[1]) for match in numbers if match)
        except OSError as error:
            os.close(self._lock_descriptor)
            raise ConfigError(f"cannot use {folder} for KV blocks ({error.strerror}): choose another folder") from error
        except ConfigError:
            os.close(self._lock_descriptor)
            raise
        self._next_number = self._found[-1] + 1 if self._found else 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{self._folder} is in use by another store of KV blocks: stop that one, or choose another folder") from error

    def _check_format(self) -> None:
        path = self._folder / FORMAT_FILE
        with suppress(FileNotFoundError):
            text = path.read_text(errors="replace").strip()
            if text == FORMAT:
                return
            raise ConfigError(
                f"{self._folder} holds KV blocks of another format ({text[:80]!r}; this release has {FORMAT!r}): "
                f"delete its blocks-*.kv and {FORMAT_FILE}, or choose another folder"
            )
        unfinished = path.with_suffix(".new")
        with unfinished.open("w") as file:
            file.write(f"{FORMAT}\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)

    @property
    def active_bytes(self) -> int:
        """Size of the segment that is being written; 0 where none is."""
        return 0 if self._active is None else self._active.end_bytes

    def load(self) -> Iterator[tuple[Segment, Record]]:
        """The records that are there, oldest first; to be called once. What is behind a bad one is cut off."""
        for number in self._found:
            path = self._folder / f"blocks-{number:010}.kv"
            if path.is_file() and not path.is_symlink():
                yield from self._load(Segment(number=number, path=path))

    def _load(self, segment: Segment) -> Iterator[tuple[Segment, Record]]:
        self.segments[segment.number] = segment
        descriptor = -1
        try:
            descriptor = os.open(segment.path, os.O_RDONLY)
            size_bytes = os.fstat(descriptor).st_size
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # headers only: no reading ahead
            self.used_bytes += size_bytes
            good_bytes, segment.end_bytes = 0, size_bytes
            for record in scan(descriptor, size_bytes):
                yield segment, record
                good_bytes = record.end_bytes
        except OSError:
            return  # what cannot be read now stays as it is, unknown
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if good_bytes < size_bytes:
            self.lost_bytes += size_bytes - good_bytes
            with suppress(OSError):  # read-only
                os.truncate(segment.path, good_bytes)
                segment.end_bytes = good_bytes
                self.used_bytes -= size_bytes - good_bytes
        if not segment.end_bytes:
            with suppress(OSError):
                self.remove(segment)

    def append(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> tuple[Segment, int]:
        """Writes whole records; their segment, and where the first one starts. Raises OSError and leaves nothing."""
        size_bytes = sum(map(len, buffers))
        if self.active_bytes + size_bytes > self.segment_bytes:
            self.seal()
        segment = self._active or self._begin()
        start = segment.end_bytes
        try:
            if os.pwritev(self._descriptor, buffers, start) != size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, start)
            self.seal()
            raise
        segment.end_bytes += size_bytes
        segment.keys.extend(keys)
        self.used_bytes += size_bytes
        return segment, start

    def _begin(self) -> Segment:
        number, self._next_number = self._next_number, self._next_number + 1
        path = self._folder / f"blocks-{number:010}.kv"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._active = self.segments[number] = Segment(number=number, path=path)
        return self._active

    def seal(self) -> None:
        """The segment that is being written is full, or to go."""
        segment, self._active = self._active, None
        if segment is not None:
            # Written out from now on, so that not all of a burst waits in the page cache.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._descriptor)
            if not segment.end_bytes:
                with suppress(OSError):
                    self.remove(segment)

    def seal_if(self, segment: Segment) -> None:
        """Nothing more is to be written to this one."""
        if segment is self._active:
            self.seal()

    def remove(self, segment: Segment) -> None:
        """Deletes it; raises OSError where its file stays, and with it the segment."""
        self.seal_if(segment)
        segment.path.unlink(missing_ok=True)
        if self.segments.pop(segment.number, None) is not None:
            self.used_bytes -= segment.end_bytes

    def bury(self, segment: Segment, offset_bytes: int, key: bytes, payload_bytes: int) -> None:
        """Puts a tombstone over a block's header, as far as the disk lets it: the block is not to come back with a restart."""
        with suppress(OSError):
            descriptor = os.open(segment.path, os.O_WRONLY)
            try:
                os.pwrite(descriptor, tombstone(key, payload_bytes), offset_bytes)
            finally:
                os.close(descriptor)

    def free_bytes(self) -> int:
        """What the file system still takes. Raises OSError."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Lets another process use the folder."""
        self.seal()
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1


class SegmentReader:
    """Reads records, from any thread while others write; the file read last stays open until the end of the `with`."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._descriptor = -1

    def __enter__(self) -> "SegmentReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._segment is not None:
            os.close(self._descriptor)
            self._segment = None

    def read(self, segment: Segment, offset_bytes: int, buffers: Sequence[bytearray | memoryview]) -> None:
        """Fills the buffers from there on, as far as the file goes. Raises OSError; FileNotFoundError where the segment is gone."""
        if segment is not self._segment:
            self._close()
            self._descriptor = os.open(segment.path, os.O_RDONLY)
            self._segment = segment
        os.preadv(self._descriptor, buffers, offset_bytes)
