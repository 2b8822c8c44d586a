"""When a process counts as hung: it is stopped (SIGSTOP), or shows no sign of life, at several looks in a row.

Looks are counted, not seconds: who was stopped or starved itself must not take its own pause for another's. Must not know what hangs.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tandem.polling import poll_until

LOOK_S = 1.0
STOPPED_LOOKS = 3  # in a row: stopped for 2 s at least, so that a debugger's or a shell's short stop costs nothing
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12  # fields of /proc/PID/stat after the name (proc(5))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLook:
    """What the kernel says of a process."""

    is_stopped: bool
    cpu_ticks: int  # used so far by all its threads


def try_look(pid: int) -> ProcessLook | None:
    """None where there is no such process. Reads /proc, 20 us."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessLook(is_stopped=fields[_STATE] == "T", cpu_ticks=int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS]))


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped now."""
    look = try_look(pid)
    return look is not None and look.is_stopped


class HangJudge:
    """Counts looks at one process. `silent_looks`: how many without a sign of life make a hang."""

    def __init__(self, *, stopped_looks: int = STOPPED_LOOKS, silent_looks: int) -> None:
        self._stopped_looks = stopped_looks
        self._silent_looks = silent_looks
        self._stopped = 0
        self._silent = 0

    def judge(self, *, is_stopped: bool, is_silent: bool) -> str:
        """Takes one look in; what it did where it hangs, to follow its name in a sentence, else ""."""
        self._stopped = self._stopped + 1 if is_stopped else 0
        self._silent = self._silent + 1 if is_silent else 0
        if self._stopped >= self._stopped_looks:
            return "was stopped by a signal"
        if self._silent >= self._silent_looks:
            return f"did not answer {self._silent} times in a row"
        return ""


@contextlib.asynccontextmanager
async def killed_if_stopped(pid: int, look_s: float = LOOK_S) -> AsyncIterator[None]:
    """For as long as the context lasts the process is killed where it is stopped: whoever waits for its end may start it again."""
    task = asyncio.create_task(_kill_if_stopped(pid, look_s), name=f"look at {pid}")
    try:
        yield
    finally:
        task.cancel()


async def _kill_if_stopped(pid: int, look_s: float) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    judge = HangJudge(silent_looks=1)
    try:
        await poll_until(lambda: judge.judge(is_stopped=is_stopped(pid), is_silent=False) or None, look_s)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os.close(process)
