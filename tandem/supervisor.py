"""Keeps one replica process alive: takes over the one that a predecessor left, or starts it; starts it again when it dies or hangs.

Gives up after a few deaths a minute, and where another supervisor has taken its replica over.

Knows neither Ray nor routers; a Ray actor or a test owns it and stops it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from tandem.config import ReplicaConfig
from tandem.errors import ConfigError
from tandem.launch import ReplicaProcess

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
_TAKE_S = 5.0  # that a stop waits for a take-over which has begun: given up, it would leave the replica to itself

Start = Callable[[ReplicaConfig], Awaitable[ReplicaProcess]]
Adopt = Callable[[ReplicaConfig], Coroutine[None, None, ReplicaProcess | None]]


async def adopt_nothing(config: ReplicaConfig) -> ReplicaProcess | None:
    """For replicas that had no supervisor before."""
    return None


class SupervisedState(StrEnum):
    """Where a supervised replica is."""

    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorReport:
    """What a supervisor says of its replica. `version` grows with every change."""

    replica_id: str
    state: SupervisedState
    version: int
    pid: int = 0
    address: str = ""
    incarnation: int = 0
    restarts: int = 0
    error: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for another process."""
        return asdict(self)


class ReplicaSupervisor:
    """One replica. `start` is how a process comes up: `ZygoteClient.start_replica` or `spawn_replica`; `adopt`, `try_adopt`."""

    def __init__(
        self,
        config: ReplicaConfig,
        start: Start,
        clock: Callable[[], float] = time.monotonic,
        *,
        adopt: Adopt = adopt_nothing,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        self._config = config
        self._start = start
        self._adopt = adopt
        self._clock = clock
        self._max_restarts = max_restarts
        self._task: asyncio.Task[None] | None = None
        self._process: ReplicaProcess | None = None
        self._taking: asyncio.Task[ReplicaProcess | None] | None = None
        self._changed = asyncio.Condition()
        self.report = SupervisorReport(replica_id=config.replica_id, state=SupervisedState.STARTING, version=0)

    @property
    def process(self) -> ReplicaProcess | None:
        """The process that runs or starts now, or was the last one."""
        return self._process

    def begin(self) -> None:
        """Starts supervising; nothing where that has been done."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name=f"supervise {self._config.replica_id}")

    async def changed(self, version: int) -> SupervisorReport:
        """Waits until the report is newer than `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.report.version > version)
            return self.report

    async def wait_running(self) -> ReplicaProcess:
        """The process once it serves. Raises ConfigError with its own words where it does not come up."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.report.state is not SupervisedState.STARTING)
        if self.report.state is not SupervisedState.RUNNING or self._process is None:
            raise ConfigError(self.report.error or f"replica {self._config.replica_id} is stopped")
        return self._process

    async def stop(self) -> None:
        """Ends the replica for good: it has its grace time, then SIGKILL."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self._process or await self._try_taken()
        if process is not None:
            await process.stop()
        await self._tell(state=SupervisedState.STOPPED, pid=0, address="", incarnation=0)

    async def _try_taken(self) -> ReplicaProcess | None:
        """What a take-over that has begun still brings."""
        if self._taking is None:
            return None
        await asyncio.wait({self._taking}, timeout=_TAKE_S)
        if self._taking.done():
            return None if self._taking.exception() else self._taking.result()
        self._taking.cancel()
        return None

    async def _supervise(self) -> None:
        try:
            await self._keep_alive()
        except Exception as failure:  # the task's root: whoever owns the replica must learn that nobody looks after it
            logger.exception("supervision_failed replica_id=%s", self._config.replica_id)
            error = f"replica {self._config.replica_id} is no longer supervised: {failure!r}"
            await self._tell(state=SupervisedState.FAILED, pid=0, address="", incarnation=0, error=error)

    async def _keep_alive(self) -> None:
        deaths_s: list[float] = []
        config = self._config
        while True:
            error = await self._run(config)
            if self._process is not None and self._process.is_lost:
                await self._tell(state=SupervisedState.FAILED, pid=0, address="", incarnation=0, error=error)
                return
            port = self._config.port
            if self._process is not None:
                await self._process.stop()
                if self._process.address:  # routers may know it by that; one that did not come up may have found its last port taken
                    port = int(self._process.address.rpartition(":")[2])
            config = replace(config, port=port)
            now_s = self._clock()
            deaths_s = [death_s for death_s in deaths_s if now_s - death_s < RESTART_WINDOW_S] + [now_s]
            logger.warning("replica_died replica_id=%s deaths=%d error=%s", config.replica_id, len(deaths_s), error)
            ended = {"pid": 0, "address": "", "incarnation": 0, "error": error}
            if len(deaths_s) > self._max_restarts or self.report.version == 0:  # what never came up will not the second time
                await self._tell(state=SupervisedState.FAILED, **ended)
                return
            await self._tell(state=SupervisedState.STARTING, restarts=self.report.restarts + 1, **ended)

    async def _run(self, config: ReplicaConfig) -> str:
        """One life of the replica, the first of them perhaps begun under another supervisor; why it ended."""
        try:
            process = await self._take_over(config) if self._process is None else None
            if process is None:
                process = await self._start(replace(config, incarnation=time.time_ns()))
            self._process = process
            await process.wait_ready()
        except (ConfigError, OSError) as failure:
            return str(failure)
        except Exception as failure:  # a bug must not leave a replica that nobody looks after
            logger.exception("replica_start_failed replica_id=%s", config.replica_id)
            return f"replica {config.replica_id} could not be started: {failure!r}"
        await self._tell(
            state=SupervisedState.RUNNING, pid=process.pid, address=process.address, incarnation=process.config.incarnation, error=""
        )
        await asyncio.shield(process.exited)
        return process.told("has another supervisor" if process.is_lost else "died")

    async def _take_over(self, config: ReplicaConfig) -> ReplicaProcess | None:
        """The process that a predecessor left. Goes on where this is cancelled: `stop` waits for it."""
        self._taking = asyncio.create_task(self._adopt(config), name=f"take over {config.replica_id}")
        return await asyncio.shield(self._taking)

    async def _tell(self, **changes: object) -> None:
        async with self._changed:
            self.report = replace(self.report, version=self.report.version + 1, **changes)  # type: ignore[arg-type]
            self._changed.notify_all()
