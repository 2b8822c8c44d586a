"""Whose a replica is: one supervisor's at a time, by a lifeline; without one it serves on for a grace time and waits to be adopted.

The replica itself is the only judge, so that two supervisors can never both own it. Must not end it: `Ending` is told.

A supervisor that looks for the replica connects to its socket and hears `replica adopted ...`, and the connection is the lifeline from then
on, or `owned`.
"""

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tandem.config import ReplicaConfig
from tandem.ending import Ending
from tandem.errors import ConfigError, Reason
from tandem.lifeline import PING, PONG, STOP, TAKEN
from tandem.tether import hold

logger = logging.getLogger(__name__)

OWNED = "owned"
OWNER_SILENT_S = 5.0  # a living supervisor asks each second
_CLAIM_S = 10.0  # a killed predecessor's engine core ends within 0.1 s, and holds the claim too


def claim_file(config: ReplicaConfig) -> Path:
    """Locked for as long as a process of this replica lives; its pid is in it."""
    return Path(config.runtime_dir) / f"{config.replica_id}.lock"


def adopt_socket(config: ReplicaConfig) -> Path:
    """Where the replica waits for its next supervisor. Short: the kernel takes 107 bytes, and an id may be long."""
    return Path(config.runtime_dir) / f"{hashlib.sha256(config.replica_id.encode()).hexdigest()[:12]}.adopt"


def claim(config: ReplicaConfig, wait_s: float = _CLAIM_S) -> None:
    """Makes this process the only one of its replica, for its life. Blocks for a predecessor's end; raises ConfigError where none comes."""
    path = claim_file(config)
    for _ in range(int(wait_s / 0.1) + 1):  # each try takes 0.1 s
        descriptor = hold(path)
        if descriptor is not None:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return
    raise ConfigError(f"another process of replica {config.replica_id} lives (its lock is {path})", reason=Reason.START_FAILED)


class Custody:
    """The replica's side. `introduce` gives the words that its next supervisor knows it by."""

    def __init__(self, config: ReplicaConfig, ending: Ending, introduce: Callable[[], str]) -> None:
        self._config = config
        self._ending = ending
        self._introduce = introduce
        self._server: asyncio.Server | None = None
        self._owner: asyncio.StreamWriter | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        self._abandoning: asyncio.TimerHandle | None = None

    async def open(self, lifeline_fd: int) -> None:
        """Belongs to whoever holds the other end of the lifeline; its descriptor is this object's from now on."""
        self._take(*await asyncio.open_connection(sock=socket.socket(fileno=lifeline_fd)))
        try:
            self._server = await asyncio.start_unix_server(self._meet, adopt_socket(self._config))
        except OSError as error:  # the folder's name is too long: it still ends with its grace time
            logger.warning("replica_not_adoptable replica_id=%s error=%s", self._config.replica_id, error)

    def close(self) -> None:
        """Belongs to nobody; what was said over the lifeline stays said."""
        if self._abandoning is not None:
            self._abandoning.cancel()
        if self._server is not None:
            self._server.close()
            adopt_socket(self._config).unlink(missing_ok=True)
        if self._hearing is not None:
            self._hearing.cancel()
        if self._owner is not None:
            self._owner.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Another supervisor has come."""
        if self._owner is not None:
            if asyncio.get_running_loop().time() - self._heard_s < OWNER_SILENT_S:
                writer.write(f"{OWNED}\n".encode())
                writer.close()
                return
            self._owner.write(TAKEN)
            self._release(self._owner)
        writer.write(f"{self._introduce()}\n".encode())
        logger.info("replica_adopted replica_id=%s", self._config.replica_id)
        self._take(reader, writer)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._abandoning is not None:
            self._abandoning.cancel()
        self._owner = writer
        self._heard_s = asyncio.get_running_loop().time()
        self._hearing = asyncio.create_task(self._hear(reader, writer), name="hear the supervisor")

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self._heard_s = asyncio.get_running_loop().time()
                if line == PING:
                    writer.write(PONG)
                elif line == STOP:
                    self._ending.stop()
        except (OSError, ValueError) as error:
            logger.info("lifeline_broken replica_id=%s error=%s", self._config.replica_id, error)
        if self._owner is writer:
            self._release(writer)
            self._abandoning = asyncio.get_running_loop().call_later(self._config.orphan_s, self._abandon)
            logger.warning("supervisor_lost replica_id=%s serves_on_s=%g", self._config.replica_id, self._config.orphan_s)

    def _release(self, owner: asyncio.StreamWriter) -> None:
        """The lifeline ends for its supervisor too, whoever else has inherited it."""
        self._owner = None
        if owner.can_write_eof() and not owner.is_closing():
            owner.write_eof()
        owner.close()

    def _abandon(self) -> None:
        logger.warning("supervisor_stays_away replica_id=%s", self._config.replica_id)
        self._ending.drain()
