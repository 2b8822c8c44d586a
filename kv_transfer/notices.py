"""Notices from the engine's process to its replica: what was published, what was loaded, running totals.

One datagram each over a Unix socket in the replica's private folder, so that nobody polls. Totals are cumulative: a lost one is made good
by the next.
"""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tandem.errors import ConfigError

logger = logging.getLogger(__name__)

# A replica that does not read for this long is stopped or dying; the publisher goes on without it.
_SEND_TIMEOUT_S = 1.0
_RECEIVE_BUFFER_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class TransferTotals:
    """Cumulative counts of one engine's transfers; `KvTotals` is its frozen twin."""

    published_blocks: int = 0
    published_bytes: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    corrupt_blocks: int = 0
    missing_blocks: int = 0
    unstored_blocks: int = 0  # no room in the store, or no slot granted in time
    evicted_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One event of the request `tag`: "published" (the prompt's blocks are in the store) or "loaded" (blocks were taken from it)."""

    kind: str
    tag: str
    blocks: int
    payload_bytes: int
    local_tokens: int = 0
    totals: TransferTotals = field(default_factory=TransferTotals)


class NoticeSender:
    """The engine's end. Used by the engine thread and the publisher thread; datagrams do not interleave."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_SEND_TIMEOUT_S)
        self._path = path

    def send(self, notice: Notice) -> None:
        """Sends, or drops the notice where the replica does not read."""
        try:
            self._socket.sendto(json.dumps(asdict(notice)).encode(), self._path)
        except OSError as error:
            logger.warning("notice_dropped kind=%s error=%s", notice.kind, error)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class NoticeReceiver:
    """The replica's end. Bound before the engine starts; `listen` once the event loop runs. Raises ConfigError where it cannot be bound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        try:
            path.unlink(missing_ok=True)  # of a predecessor that was killed
            self._socket.bind(str(path))
            self._inode = path.stat().st_ino
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"cannot listen on the Unix socket {path} ({error}): its folder must be writable and its path short"
            ) from error

    def listen(self, on_notice: Callable[[Notice], None]) -> None:
        """Calls `on_notice` on the running loop for each notice."""

        def read() -> None:
            while True:
                try:
                    payload = json.loads(self._socket.recv(65_536))
                except BlockingIOError:
                    return
                totals = TransferTotals(**payload.pop("totals"))
                on_notice(Notice(**payload, totals=totals))

        asyncio.get_running_loop().add_reader(self._socket.fileno(), read)

    def close(self) -> None:
        """Stops listening and removes the socket, unless a successor has bound one of that name."""
        if self._socket.fileno() >= 0:
            try:
                asyncio.get_running_loop().remove_reader(self._socket.fileno())
            except RuntimeError:
                logger.debug("notice receiver closed outside a loop")
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
