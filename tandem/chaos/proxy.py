"""A TCP proxy between a client and one router: passes, delays, swallows (a half-open connection) or resets.

Must not read what it passes.
"""

import asyncio
import contextlib
import socket
import struct

_READ_BYTES = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: closing sends RST


class Proxy:
    """Listens on a free port of loopback and connects each client to `target` (host:port). Make and use it on one event loop."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self.delay_s = 0.0  # added to each piece, both ways
        self.address = ""

    @property
    def connections(self) -> int:
        """Open ones, both ends counted."""
        return len(self._writers)

    async def start(self) -> None:
        """Sets `address`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    def black_hole(self) -> None:
        """From now on nothing passes, and no connection is closed."""
        self._is_open.clear()

    def pass_again(self) -> None:
        """Ends a black hole and a delay."""
        self.delay_s = 0.0
        self._is_open.set()

    def reset(self) -> None:
        """Ends every connection at once, by RST on both sides."""
        for writer in tuple(self._writers):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def close(self) -> None:
        """Ends all of it."""
        self.pass_again()
        self.reset()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._is_open.wait()
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
                self._writers.add(there_writer)
                try:
                    await self._join(reader, there_writer, there_reader, writer)
                finally:
                    self._drop(there_writer)
        finally:
            self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()

    async def _join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back_reader: asyncio.StreamReader,
        back_writer: asyncio.StreamWriter,
    ) -> None:
        """Both ways, until one of them ends."""
        ways = [
            asyncio.create_task(self._pass(reader, writer), name="proxy there"),
            asyncio.create_task(self._pass(back_reader, back_writer), name="proxy back"),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while payload := await reader.read(_READ_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._is_open.wait()
                writer.write(payload)
                await writer.drain()
