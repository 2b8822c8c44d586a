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
from tandem.launch import ReplicaProcess, spawn_replica

logger = logging.getLogger(__name__)

# Importing vLLM takes 6 s on an idle core and 15 s on a busy one; longer than a spawned replica needs, waiting gains nothing.
ZYGOTE_WAIT_S = 40.0
_RETRY_S = 0.1


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
        """Has the zygote fork it, or spawns it where no zygote answers in time; `wait_ready` tells when it serves."""
        deadline_s = time.monotonic() + self._wait_s
        while True:
            try:
                reader, lifeline = await asyncio.open_unix_connection(self._socket_path)
                break
            except OSError as error:
                if time.monotonic() >= deadline_s:
                    logger.warning("zygote_gone replica_id=%s error=%s", config.replica_id, error)
                    return await spawn_replica(config)
                await asyncio.sleep(_RETRY_S)
        lifeline.write(f"{config.to_json()}\n".encode())
        return ReplicaProcess(config, reader, lifeline)

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
