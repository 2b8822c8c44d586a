"""A Redis server of a test's own, on a socket in a folder of the test's; it can be killed, stopped and started again."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tandem.redis_register import RedisRegister
from tandem.redis_server import find_redis_server, redis_arguments, wait_for_redis

Open = Callable[..., RedisRegister]  # of a cluster's id and settings; closed at the end of the test


class RedisProcess:
    """At most one server at a time; `url` stays the same."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._socket_path = folder / "redis.sock"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket_path}"

    async def start(self) -> None:
        """Returns when it answers; nothing is left of an earlier one but its socket's file."""
        self.spawn()
        await wait_for_redis(self.url, 10.0)

    def spawn(self) -> None:
        """Does not wait."""
        command = [str(find_redis_server()), *redis_arguments(self._socket_path, self._folder), *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """It holds its connections and answers nothing, until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `hang`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


@asynccontextmanager
async def running_redis(folder: Path) -> AsyncIterator[RedisProcess]:
    """A server that answers; killed at the end."""
    process = RedisProcess(folder)
    try:
        await process.start()
        yield process
    finally:
        process.kill()
