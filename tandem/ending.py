"""A replica's end: at once, or once what runs has ended. Signals, the supervisor's word and its absence all come together here.

Must not end anything itself: `replica.py` does, when it is told.
"""

import asyncio
import contextlib

from tandem.worker_state import WorkerState

_IDLE_POLL_S = 1.0  # a change is told at once


class Ending:
    """Not ordered until somebody orders it."""

    def __init__(self) -> None:
        self.is_draining = False
        self.stopped = asyncio.Event()
        self._ordered = asyncio.Event()

    def stop(self) -> None:
        """The replica is to end at once."""
        self.stopped.set()
        self._ordered.set()

    def drain(self) -> None:
        """It is to end once nothing runs; told twice, at once."""
        if self.is_draining:
            self.stop()
        self.is_draining = True
        self._ordered.set()

    async def ordered(self) -> None:
        """Waits for either."""
        await self._ordered.wait()

    async def drained(self, state: WorkerState, grace_s: float) -> None:
        """Waits until nothing runs, for `grace_s` at most; not at all where the end is to come at once."""
        stopping = asyncio.create_task(self.stopped.wait(), name="wait for the end")
        draining = asyncio.create_task(_idle(state), name="wait for what runs")
        try:
            await asyncio.wait((stopping, draining), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining  # it lets go of the state


async def _idle(state: WorkerState) -> None:
    with state.watch("") as watcher:
        while state.running_requests:
            await watcher.changed(_IDLE_POLL_S)
