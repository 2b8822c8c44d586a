"""A node's zygote from outside: starting it, and having it fork replicas.

Must not import what the zygote imports.
"""

import asyncio
import logging
import os
import sys
import time
from pathlib import Path

from tandem.config import ReplicaConfig
from tandem.engine.environment import set_engine_environment
from tandem.errors import ConfigError, Reason
from tandem.launch import ReplicaProcess, spawn_replica
from tandem.lifeline import STOP

logger = logging.getLogger(__name__)

# What a spawned replica needs on busy cores (14 to 18 s on idle ones): waiting longer gains nothing. A zygote that was started again is
# there after 6 s of imports on an idle core and 15 s on a busy one, for all replicas of the node at once.
ZYGOTE_WAIT_S = 40.0
_RETRY_S = 0.1
_ANSWER_S = 10.0  # a fork takes 15 ms; a caller before this one that says nothing takes 5 s


def zygote_command(socket_path: Path, tether_path: Path, *, grace_s: float) -> list[str]:
    """The command line of a zygote that lives while somebody holds its tether."""
    options = [f"--socket={socket_path}", f"--tether={tether_path}", f"--tether-grace-s={grace_s:g}"]
    return [sys.executable, "-m", "tandem.zygote", *options]


def zygote_environment() -> dict[str, str]:
    """This process's environment with what the engine needs before it is imported."""
    environment = dict(os.environ)
    set_engine_environment(environment)
    return environment


class ZygoteClient:
    """Forks replicas through the zygote at `socket_path`, which may still be importing, or be gone for a while."""

    def __init__(self, socket_path: Path, *, wait_s: float = ZYGOTE_WAIT_S) -> None:
        self._socket_path = socket_path
        self._wait_s = wait_s

    async def start_replica(self, config: ReplicaConfig) -> ReplicaProcess:
        """Has the zygote fork it, or spawns it where no zygote answers in time or it can fork no more; `wait_ready` tells when it serves.

        Raises ConfigError where the zygote refuses.
        """
        deadline_s = time.monotonic() + self._wait_s
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    forked = await self._try_fork(config)
                break
            except OSError as error:  # TimeoutError too
                if time.monotonic() >= deadline_s:
                    logger.warning("zygote_gone replica_id=%s error=%r", config.replica_id, error)
                    forked = None
                    break
                await asyncio.sleep(_RETRY_S)
        return forked or await spawn_replica(config)

    async def _try_fork(self, config: ReplicaConfig) -> ReplicaProcess | None:
        """None where the zygote can fork no more. Raises OSError where it is away or goes meanwhile, ConfigError where it refuses."""
        reader, lifeline = await asyncio.open_unix_connection(self._socket_path)
        replica = ReplicaProcess(config, reader, lifeline)
        try:
            lifeline.write(f"{config.to_json()}\n".encode())
            line = (await reader.readline()).decode().strip()
            if line.startswith("pid "):
                replica.watch(int(line.removeprefix("pid ")))
                return replica
        except BaseException:
            lifeline.write(STOP)  # it may have been forked
            lifeline.close()
            raise
        lifeline.close()
        if not line:
            raise ConnectionResetError(f"the zygote at {self._socket_path} went before it answered")
        if line.startswith("unable "):
            logger.warning("zygote_unable replica_id=%s reason=%s", config.replica_id, line.removeprefix("unable "))
            return None
        why = line.removeprefix("replica failed ")
        raise ConfigError(f"replica {config.replica_id} could not be forked: {why}", reason=Reason.START_FAILED)

    async def wait_ready(self) -> bool:
        """Waits until the zygote forks; False where it does not come in time."""
        deadline_s = time.monotonic() + self._wait_s
        while time.monotonic() < deadline_s:
            try:
                _, writer = await asyncio.open_unix_connection(self._socket_path)
            except OSError:
                await asyncio.sleep(_RETRY_S)
            else:
                writer.close()
                return True
        return False
