"""Signals to processes of one cluster, sent through pidfds, so that none ever reaches a process that took a dead one's number.

Must not choose whom.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tandem.cleanup import MEMBER_OF

_DUTY_S = 0.1  # stopped, then running, in turn


class Held:
    """Open handles of processes that belonged to the cluster when they were opened; those that were gone are left out."""

    def __init__(self, cluster: str, pids: Iterable[int]) -> None:
        self._handles: dict[int, int] = {}
        mark = f"{MEMBER_OF}={cluster}".encode()
        for pid in pids:
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(pid)
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    self._handles[pid] = handle
                else:
                    os.close(handle)

    @property
    def pids(self) -> list[int]:
        """Whose handles there are."""
        return list(self._handles)

    def send(self, number: signal.Signals) -> None:
        """To all that live still."""
        for handle in self._handles.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)

    def close(self) -> None:
        """Lets them go on, where they were stopped, and closes the handles."""
        self.send(signal.SIGCONT)
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


async def stop_for(held: Held, hold_s: float) -> None:
    """SIGSTOP, and SIGCONT after that time, however it ends."""
    held.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(hold_s)
    finally:
        held.send(signal.SIGCONT)


async def slow_for(held: Held, hold_s: float) -> None:
    """Half the time stopped, a tenth of a second at a time."""
    ends_s = time.monotonic() + hold_s
    while time.monotonic() < ends_s:
        await stop_for(held, _DUTY_S)
        await asyncio.sleep(_DUTY_S)


def are_gone(pids: Sequence[int]) -> bool:
    """Whether none of them runs; zombies do not."""
    return not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
