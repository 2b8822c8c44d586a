"""Child processes that are started again whenever they end or are stopped by a signal, with a growing pause where they end at once.

Must not know what they are.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem.errors import ConfigError
from tandem.hang import killed_if_stopped
from tandem.launch import stop_process

_PAUSE_S = 0.1
_MAX_PAUSE_S = 10.0
_LONG_LIFE_S = 30.0

Process = asyncio.subprocess.Process
Start = Callable[[], Awaitable[Process]]


@dataclass(slots=True)
class Child:
    """One kept process. `restarts` counts how often it had to be started again."""

    name: str
    start: Start
    process: Process
    restarts: int = 0
    may_stop: bool = False  # a stopped one is left alone: others wait for it, or do without


class Keeper:
    """`progress` hears of deaths and failed starts; `on_restart` is called with a child's name once it is there again."""

    def __init__(self, progress: Callable[[str], None], on_restart: Callable[[str], None]) -> None:
        self.children: dict[str, Child] = {}
        self._progress = progress
        self._on_restart = on_restart
        self._tasks: list[asyncio.Task[None]] = []

    async def keep(self, name: str, start: Start, *, may_stop: bool = False) -> None:
        """Starts a child; returns once it is up. Raises what `start` raises the first time; later it is tried again."""
        child = self.children[name] = Child(name, start, await start(), may_stop=may_stop)
        self._tasks.append(asyncio.create_task(self._keep_alive(child), name=f"keep {name}"))

    async def release(self) -> None:
        """Starts nothing again from now on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Ends them all."""
        for child in self.children.values():
            await stop_process(child.process)

    async def _keep_alive(self, child: Child) -> None:
        pause_s = _PAUSE_S
        while True:
            started_s = time.monotonic()
            async with contextlib.nullcontext() if child.may_stop else killed_if_stopped(child.process.pid):
                await child.process.wait()
            self._progress(f"{child.name} died; starting it again")
            child.restarts += 1
            pause_s = _PAUSE_S if time.monotonic() - started_s > _LONG_LIFE_S else min(2 * pause_s, _MAX_PAUSE_S)
            while True:
                await asyncio.sleep(pause_s)
                try:
                    child.process = await child.start()
                    break
                except (ConfigError, OSError) as error:
                    self._progress(f"{child.name} does not start: {error}")
                    pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            self._on_restart(child.name)
