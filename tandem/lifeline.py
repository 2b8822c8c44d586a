"""A lifeline: a socket between a process and its supervisor. Its end says that the other side has gone.

Over a replica's lifeline go lines. The supervisor asks `ping` and says `stop`. The replica says `replica ready ...`, answers `pong`, and
says `taken` when it goes over to another supervisor.
"""

import asyncio
import os

PING, PONG, STOP, TAKEN = b"ping\n", b"pong\n", b"stop\n", b"taken\n"


def stop_at_end(lifeline_fd: int, stop: asyncio.Event) -> None:
    """Has the running loop set `stop` once the lifeline has ended; what comes over it before is passed over."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        try:
            has_ended = not os.read(lifeline_fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            has_ended = True
        if has_ended:
            loop.remove_reader(lifeline_fd)
            stop.set()

    loop.add_reader(lifeline_fd, look)


class SupervisorEnd:
    """The supervisor's end of a replica's lifeline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._listening: asyncio.Task[None] | None = None
        self._is_answered = True
        self.is_taken = False

    async def read_line(self) -> str:
        """The replica's next line; "" at the end. Not after `listen`. Raises OSError, ValueError where it is none."""
        return (await self._reader.readline()).decode()

    def listen(self) -> None:
        """Takes answers from now on."""
        self._listening = asyncio.create_task(self._listen(), name="hear a replica")

    def ping(self) -> bool:
        """Asks for a sign of life; whether the question before has been answered."""
        if self._listening is None:
            return True
        is_answered, self._is_answered = self._is_answered, False
        if not self._writer.is_closing():
            self._writer.write(PING)
        return is_answered

    def say_stop(self) -> None:
        """Has the replica end at once. Without that it takes the lifeline's end for its supervisor's death, and serves on for a while."""
        if not self._writer.is_closing():
            self._writer.write(STOP)

    def close(self) -> None:
        """Lets go of it."""
        if self._listening is not None:
            self._listening.cancel()
        self._writer.close()

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self._is_answered = self._is_answered or line == PONG
                self.is_taken = self.is_taken or line == TAKEN
        except (OSError, ValueError):
            return
