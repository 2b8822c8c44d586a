"""Starting and ending the platform's processes: replicas, forked (`zygote_client.py`) or spawned, and the programs beside them.

Every process is known by pid and ended by whoever started it; nothing outlives its supervisor.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tandem.config import ReplicaConfig
from tandem.engine.environment import set_engine_environment
from tandem.errors import ConfigError, Reason
from tandem.parenthood import die_with_parent

_STOP_S = 10.0
_PROGRAM_START_S = 60.0
_REPLICA_START_S = 300.0


class ReplicaProcess:
    """One running replica: its lifeline and its pid. `exited` resolves when it is gone, for whatever reason.

    `child` is the replica's process where it is this process's own child; the zygote reaps the others.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        reader: asyncio.StreamReader,
        lifeline: asyncio.StreamWriter,
        child: asyncio.subprocess.Process | None = None,
    ) -> None:
        self.config = config
        self.pid = 0
        self.address = ""
        self._reader = reader
        self._lifeline = lifeline
        self._child = child
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_ready(self) -> None:
        """Reads reports until the replica serves. Raises ConfigError with the replica's own words where it fails."""
        try:
            async with asyncio.timeout(_REPLICA_START_S):
                while line := (await self._reader.readline()).decode().strip():
                    word, _, rest = line.partition(" ")
                    if word == "pid":
                        self._watch(int(rest))
                    elif word == "exit":
                        break
                    elif rest.startswith("failed"):
                        raise ConfigError(rest.removeprefix("failed "), reason=Reason.START_FAILED)
                    elif rest.startswith("ready"):
                        self.address = dict(part.split("=") for part in rest.split()[1:])["address"]
                        return
        except TimeoutError as error:
            raise ConfigError(
                f"replica {self.config.replica_id} did not start in {_REPLICA_START_S:.0f} s", reason=Reason.START_FAILED
            ) from error
        where = f"; its log is {self.config.log_path}" if self.config.log_path else ""
        raise ConfigError(f"replica {self.config.replica_id} ended while starting{where}", reason=Reason.START_FAILED)

    def _watch(self, pid: int) -> None:
        self.pid = pid
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self.exited.set_result(None)
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            if not self.exited.done():
                self.exited.set_result(None)

        loop.add_reader(descriptor, ended)

    async def stop(self) -> None:
        """Ends the replica: lifeline first, SIGKILL where that is not enough. Also closes the lifeline of a dead one; again is no harm."""
        if not self._lifeline.is_closing():
            with contextlib.suppress(OSError):
                self._lifeline.write_eof()
        if self.pid:
            try:
                async with asyncio.timeout(_STOP_S):
                    await asyncio.shield(self.exited)
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                await self.exited
        if self._child is not None:
            await self._child.wait()
        self._lifeline.close()


async def spawn_replica(config: ReplicaConfig) -> ReplicaProcess:
    """Starts a replica in a fresh interpreter (CUDA, or no zygote); it must import everything first."""
    ours, theirs = socket.socketpair()
    environment = dict(os.environ)
    set_engine_environment(environment)
    with theirs, _log(config.log_path) as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{config.role}_workers",
            f"--config-json={config.to_json()}",
            f"--lifeline-fd={theirs.fileno()}",
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    replica = ReplicaProcess(config, *await asyncio.open_connection(sock=ours), child=process)
    replica._watch(process.pid)
    return replica


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


async def start_program(arguments: Sequence[str], log_path: Path, *, ready: str) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    """Starts `python -m ...`, which dies with this process and logs to `log_path`; returns it once it has printed its line `ready`.

    The line's key=value parts come along ("router ready address=..."). Raises ConfigError with the program's own last line.
    """
    with _log(str(log_path)) as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PROGRAM_START_S):
            while line := (await process.stdout.readline()).decode():
                if line.startswith(ready):
                    return process, dict(part.split("=", 1) for part in line.split() if "=" in part)
            await process.wait()
    except BaseException:
        await stop_process(process)
        raise
    raise ConfigError(_tail(log_path).removeprefix(f"{arguments[0]}: "), reason=Reason.START_FAILED)


def check_port(host: str, port: int, flag: str = "--port") -> None:
    """Raises ConfigError where host:port cannot be listened on; asked before anything is started."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        message = f"port {port} on {host} is in use or not allowed: choose another with {flag}"
        raise ConfigError(message, reason=Reason.PORT_IN_USE) from error


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no log"


def remove_folder(path: Path) -> None:
    """Removes a folder of ours and all in it."""
    shutil.rmtree(path, ignore_errors=True)
