"""Starting and ending the platform's processes: replicas, forked (`zygote_client.py`) or spawned, and the programs beside them.

Every process is known by pid and ended by whoever started it. A replica alone outlives its supervisor's death, for a while (`custody.py`).
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from tandem.config import ReplicaConfig
from tandem.engine.environment import set_engine_environment
from tandem.errors import ConfigError, Reason
from tandem.hang import LOOK_S, HangJudge, is_stopped
from tandem.lifeline import SupervisorEnd
from tandem.membership import REGISTER_URL
from tandem.node_folder import MEMBER_OF
from tandem.parenthood import die_with_parent

_STOP_S = 10.0
_PROGRAM_START_S = 60.0
_REPLICA_START_S = 300.0
_MAX_TAIL_BYTES = 1 << 16  # of a log: more than any traceback
_MAX_WORDS_CHARACTERS = 300
_TELLS_ERROR = re.compile(r"\b(\w*(Error|Exception)|ERROR|CRITICAL|FATAL)\b|Fatal|fatal")


class ReplicaProcess:
    """One running replica: its lifeline and its pid. `exited` resolves when it is gone, or no longer this supervisor's (`is_lost`).

    Make it before the replica can have written to its log. A replica that hangs is killed.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        reader: asyncio.StreamReader,
        lifeline: asyncio.StreamWriter,
    ) -> None:
        self.config = config
        self.pid = 0
        self.address = ""
        self.is_lost = False
        self._log_start_bytes = _size_bytes(config.log_path)
        self._line = SupervisorEnd(reader, lifeline)
        self._child: asyncio.subprocess.Process | None = None  # the zygote reaps the others
        self._hang = ""  # what it did, where it was killed for it
        self._tending: asyncio.Task[None] | None = None
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_ready(self) -> None:
        """Reads reports until the replica serves. Raises ConfigError with the replica's own words where it fails."""
        try:
            async with asyncio.timeout(_REPLICA_START_S):
                while not self.address and (line := (await self._line.read_line()).strip()):
                    word, _, rest = line.partition(" ")
                    if word == "exit":
                        break
                    if rest.startswith("failed"):
                        raise ConfigError(rest.removeprefix("failed "), reason=Reason.START_FAILED)
                    if rest.startswith("ready"):
                        self.address = dict(part.split("=") for part in rest.split()[1:])["address"]
                        self._line.listen()
        except TimeoutError as error:
            raise ConfigError(self.told(f"did not start in {_REPLICA_START_S:.0f} s"), reason=Reason.START_FAILED) from error
        if not self.address:
            raise ConfigError(self.told("ended while starting"), reason=Reason.START_FAILED)

    def told(self, event: str) -> str:
        """A sentence about this replica with the last words of this life's log, which may be gone when it is read, and where that is."""
        words = last_words(Path(self.config.log_path), self._log_start_bytes) if self.config.log_path else ""
        where = f"; its log is {self.config.log_path}" if self.config.log_path else ""
        return f"replica {self.config.replica_id} {self._hang or event}{f': {words}' if words else ''}{where}"

    def adopt(self, pid: int, address: str) -> None:
        """Takes over a replica that serves already."""
        self.address = address
        self._line.listen()
        self.watch(pid)

    def watch(self, pid: int, child: asyncio.subprocess.Process | None = None) -> None:
        """Takes `pid` for the replica's; `exited` follows it from now on. `child` is its process where it is this process's own child."""
        self.pid = pid
        self._child = child
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._note_exit()
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._note_exit()

        loop.add_reader(descriptor, ended)
        self._tending = asyncio.create_task(self._tend(), name=f"tend {self.config.replica_id}")

    async def _tend(self) -> None:
        """A look a second: kills the replica where it hangs, gives it up where another supervisor has taken it over."""
        judge = HangJudge(silent_looks=max(1, round(self.config.silence_s / LOOK_S)))
        while not self._hang:
            await asyncio.sleep(LOOK_S)
            if self._line.is_taken:
                self.is_lost = True
                self._note_exit()
                return
            self._hang = judge.judge(is_stopped=is_stopped(self.pid), is_silent=not self._line.ping())
        self._kill()

    def _kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._note_exit()

    def _note_exit(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
        if not self.exited.done():
            self.exited.set_result(None)

    async def stop(self) -> None:
        """Ends the replica at once: by a word, by SIGKILL where that is not enough. Again, of a dead one, of a lost one is no harm."""
        if not self.is_lost:
            self._line.say_stop()
            if self.pid:
                try:
                    async with asyncio.timeout(_STOP_S):
                        await asyncio.shield(self.exited)
                except TimeoutError:
                    self._kill()
                    await self.exited
            if self._child is not None and not self.is_lost:
                await self._child.wait()
        self._line.close()


async def spawn_replica(config: ReplicaConfig) -> ReplicaProcess:
    """Starts a replica in a fresh interpreter (CUDA, or no zygote); it must import everything first. Raises ConfigError."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, REGISTER_URL: config.redis_url, MEMBER_OF: config.cluster or os.environ.get(MEMBER_OF, "")}
    set_engine_environment(environment)
    with theirs:
        replica = ReplicaProcess(config, *await asyncio.open_connection(sock=ours))
        try:
            with _start_errors(f"replica {config.replica_id}"), _log(config.log_path) as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    f"{config.role}_workers",
                    f"--config-json={replace(config, redis_url='').to_json()}",
                    f"--lifeline-fd={theirs.fileno()}",
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except BaseException:
            await replica.stop()
            raise
    replica.watch(process.pid, child=process)
    return replica


@contextlib.contextmanager
def _start_errors(name: str) -> Iterator[None]:
    """ConfigError where a process cannot be made."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{name} could not be started: {error}", reason=Reason.START_FAILED) from error


@contextlib.contextmanager
def _log(path: str) -> Iterator[BinaryIO | None]:
    if not path:
        yield None
        return
    with open(path, "ab") as log:
        yield log


async def stop_process(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, then SIGKILL after a while; returns when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def start_program(
    arguments: Sequence[str], log_path: Path, *, ready: str, environment: Mapping[str, str] | None = None
) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    """Starts `python -m ...`, which dies with this process and logs to `log_path`; returns it once it has printed its line `ready`.

    The line's key=value parts come along ("router ready address=..."). Raises ConfigError with the program's own last line.
    """
    with _start_errors(arguments[0]), _log(str(log_path)) as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=die_with_parent,
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PROGRAM_START_S):
            while line := (await process.stdout.readline()).decode():
                if line.startswith(ready):
                    return process, dict(part.split("=", 1) for part in line.split() if "=" in part)
            await process.wait()
    except TimeoutError as error:
        await stop_process(process)
        message = f"{arguments[0]} did not start in {_PROGRAM_START_S:g} s: {tail(log_path)}"
        raise ConfigError(message, reason=Reason.START_FAILED) from error
    except BaseException:
        await stop_process(process)
        raise
    raise ConfigError(tail(log_path).removeprefix(f"{arguments[0]}: "), reason=Reason.START_FAILED)


def check_port(host: str, port: int, flag: str = "--port") -> None:
    """Raises ConfigError where host:port cannot be listened on; asked before anything is started."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        message = f"port {port} on {host} is in use or not allowed: choose another with {flag}"
        raise ConfigError(message, reason=Reason.PORT_IN_USE) from error


def tail(path: Path) -> str:
    """The last line of a log."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no log"


def last_words(path: Path, start_bytes: int = 0) -> str:
    """Of what a log holds from `start_bytes` on, the last line that tells of an error, else the last line; "" where there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(start_bytes, log.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
            text = log.read(_MAX_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLS_ERROR.search(line)]
    return (telling or lines or [""])[-1][:_MAX_WORDS_CHARACTERS]


def _size_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def remove_folder(path: Path) -> None:
    """Removes a folder of ours and all in it."""
    shutil.rmtree(path, ignore_errors=True)
