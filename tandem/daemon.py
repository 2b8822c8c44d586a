"""A process that outlives its starter: nobody's child, found again by the file its pid is in, kept alive by whoever is there."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tandem.hang import killed_if_stopped
from tandem.node_folder import MEMBER_OF
from tandem.zygote_client import zygote_environment

logger = logging.getLogger(__name__)

_RESTART_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0
_STOP_S = 5.0
_DETACH = 'exec 3>&-; "$@" </dev/null >>"$TANDEM_LOG" 2>&1 & echo $!'


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A process that is not this one's child, known by the file its pid is in."""

    name: str
    cluster: str
    command: list[str]
    pid_file: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def try_pid(self) -> int | None:
        """The pid where it runs."""
        try:
            pid = int(self.pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.command[2]) in command else None  # the module's name: the pid may be another's by now

    async def start(self) -> int:
        """Starts it through a shell that ends at once, so that it is nobody's child."""
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            _DETACH,
            "sh",
            *self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**zygote_environment(), **self.environment, MEMBER_OF: self.cluster, "TANDEM_LOG": str(self.log)},
            start_new_session=True,
        )
        assert process.stdout is not None
        answer = await process.stdout.readline()
        await process.wait()
        if not answer:  # the shell could not fork
            raise ChildProcessError(f"{self.name} could not be started")
        pid = int(answer)
        self.pid_file.write_text(str(pid))
        return pid

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after a while."""
        pid = self.try_pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await _ended(pid)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def keep_alive(daemon: Daemon, is_over: Callable[[], bool]) -> None:
    """Starts it where it does not run and again whenever it ends, with a growing pause where it ends at once; until it `is_over`."""
    pause_s = _RESTART_PAUSE_S
    while not is_over():
        started_s = asyncio.get_running_loop().time()
        try:
            pid = daemon.try_pid() or await daemon.start()
            logger.info("daemon_runs name=%s pid=%d", daemon.name, pid)
            async with killed_if_stopped(pid):
                await _ended(pid)
        except OSError as error:
            logger.warning("daemon_not_started name=%s error=%s", daemon.name, error)
        logger.warning("daemon_ended name=%s", daemon.name)
        lived_s = asyncio.get_running_loop().time() - started_s
        pause_s = _RESTART_PAUSE_S if lived_s > _MAX_PAUSE_S else min(2 * pause_s, _MAX_PAUSE_S)
        await asyncio.sleep(pause_s)


async def _ended(pid: int) -> None:
    """Returns when the process is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
