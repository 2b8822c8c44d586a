"""Word from whoever puts blocks to the node's store service: something became visible. Says nothing else, and never waits."""

import contextlib
import os
import socket
from pathlib import Path

PUBLISHED_SOCKET = "published.sock"  # in the store's folder


class Announcer:
    """Tells this node's store service that blocks became visible; says nothing where there is none. Never waits."""

    def __init__(self, folder: Path) -> None:
        self._path = os.fspath(folder / PUBLISHED_SOCKET)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def announce(self) -> None:
        """One datagram; lost where nobody listens, or the service is behind."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", self._path)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
