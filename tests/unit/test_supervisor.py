"""One supervised replica: restarts, ports, and what becomes of it where even its supervision fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from tandem.config import EngineConfig, ReplicaConfig
from tandem.errors import ConfigError
from tandem.launch import ReplicaProcess
from tandem.supervisor import MAX_RESTARTS, Adopt, ReplicaSupervisor, SupervisedState, SupervisorReport, adopt_nothing

CONFIG = ReplicaConfig(replica_id="r-0", role="decode", incarnation=1, served_model="m", engine=EngineConfig())


class FakeProcess:
    """Serves at its configured port (0: port 7) until it is killed."""

    def __init__(self, config: ReplicaConfig, *, error: str = "", stop_error: Exception | None = None) -> None:
        self.config = config
        self.pid = 5
        self.address = ""
        self.port = config.port
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_stopped = False
        self.is_lost = False
        self._error = error
        self._stop_error = stop_error

    async def wait_ready(self) -> None:
        if self._error:
            raise ConfigError(self._error)
        self.address = f"h:{self.port or 7}"

    def told(self, event: str) -> str:
        return f"replica r-0 {event}: last words"

    async def stop(self) -> None:
        self.is_stopped = True
        if self._stop_error is not None:
            raise self._stop_error

    def die(self) -> None:
        self.exited.set_result(None)

    def be_taken(self) -> None:
        """By another supervisor."""
        self.is_lost = True
        self.exited.set_result(None)


class Starter:
    """Gives the lives that a test prepares, then plain ones."""

    def __init__(self, *lives: Callable[[ReplicaConfig], FakeProcess]) -> None:
        self.started: list[FakeProcess] = []
        self._lives = list(lives)

    async def __call__(self, config: ReplicaConfig) -> ReplicaProcess:
        life = self._lives.pop(0) if self._lives else FakeProcess
        self.started.append(life(config))
        return cast(ReplicaProcess, self.started[-1])


@asynccontextmanager
async def supervised(starter: Starter, adopt: Adopt = adopt_nothing) -> AsyncIterator[ReplicaSupervisor]:
    supervisor = ReplicaSupervisor(CONFIG, starter, clock=lambda: 0.0, adopt=adopt)
    supervisor.begin()
    yield supervisor
    await supervisor.stop()


async def until(supervisor: ReplicaSupervisor, state: SupervisedState, version: int = -1) -> SupervisorReport:
    report = await supervisor.changed(version)
    while report.state is not state:
        report = await supervisor.changed(report.version)
    return report


def fails(config: ReplicaConfig) -> FakeProcess:
    return FakeProcess(config, error=f"port {config.port} is in use")


async def test_a_replica_that_dies_is_started_again_on_its_port_with_its_last_words_told(caplog: pytest.LogCaptureFixture) -> None:
    starter = Starter()
    async with supervised(starter) as supervisor:
        first = await until(supervisor, SupervisedState.RUNNING)
        starter.started[0].die()
        second = await until(supervisor, SupervisedState.RUNNING, first.version)
        assert second.restarts == 1
        assert second.incarnation > first.incarnation
    assert "error=replica r-0 died: last words" in caplog.text
    assert [process.port for process in starter.started] == [0, 7]
    assert all(process.is_stopped for process in starter.started)


async def test_a_port_that_was_taken_meanwhile_is_given_up() -> None:
    starter = Starter(FakeProcess, fails)
    async with supervised(starter) as supervisor:
        first = await until(supervisor, SupervisedState.RUNNING)
        starter.started[0].die()
        assert (await until(supervisor, SupervisedState.RUNNING, first.version)).restarts == 2
    assert [process.port for process in starter.started] == [0, 7, 0]


async def test_a_replica_that_dies_too_often_is_given_up() -> None:
    starter = Starter()
    async with supervised(starter) as supervisor:
        version = 0
        for _ in range(MAX_RESTARTS + 1):
            version = (await until(supervisor, SupervisedState.RUNNING, version)).version
            starter.started[-1].die()
        assert (await until(supervisor, SupervisedState.FAILED, version)).restarts == MAX_RESTARTS


async def test_a_replica_that_never_came_up_is_not_tried_again() -> None:
    starter = Starter(fails)
    async with supervised(starter) as supervisor:
        with pytest.raises(ConfigError, match="port 0 is in use"):
            await supervisor.wait_running()
        assert supervisor.report.state is SupervisedState.FAILED
    assert len(starter.started) == 1


@pytest.mark.parametrize("error", [ProcessLookupError(3, "no such process"), RuntimeError("a bug")])
async def test_a_replica_that_cannot_be_cleared_away_is_told_as_failed(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    starter = Starter(lambda config: FakeProcess(config, stop_error=error))
    supervisor = ReplicaSupervisor(CONFIG, starter, clock=lambda: 0.0)
    supervisor.begin()
    running = await until(supervisor, SupervisedState.RUNNING)
    starter.started[0].die()
    failed = await until(supervisor, SupervisedState.FAILED, running.version)
    assert (failed.pid, failed.address) == (0, "")
    assert repr(error) in failed.error
    assert "supervision_failed replica_id=r-0" in caplog.text


async def test_a_replica_that_a_predecessor_left_is_taken_over_once_and_restarted_like_any_other() -> None:
    left: list[FakeProcess] = []

    async def adopt(config: ReplicaConfig) -> ReplicaProcess:
        left.append(FakeProcess(replace(config, incarnation=77, port=9)))
        return cast(ReplicaProcess, left[-1])

    starter = Starter()
    async with supervised(starter, adopt) as supervisor:
        first = await until(supervisor, SupervisedState.RUNNING)
        assert (first.incarnation, first.address, first.restarts) == (77, "h:9", 0)
        assert not starter.started
        left[0].die()
        second = await until(supervisor, SupervisedState.RUNNING, first.version)
        assert second.incarnation > 77
    assert len(left) == 1
    assert [process.port for process in starter.started] == [9]


async def test_a_supervisor_that_is_stopped_while_it_takes_a_replica_over_ends_it() -> None:
    left: list[FakeProcess] = []
    is_asked = asyncio.Event()

    async def adopt(config: ReplicaConfig) -> ReplicaProcess:
        is_asked.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        left.append(FakeProcess(config))
        return cast(ReplicaProcess, left[-1])

    async with supervised(Starter(), adopt):
        await is_asked.wait()
    assert left[0].is_stopped


async def test_a_take_over_that_brings_nothing_stops_nobody_from_stopping() -> None:
    is_asked = asyncio.Event()

    async def adopt(config: ReplicaConfig) -> ReplicaProcess | None:
        is_asked.set()
        await asyncio.sleep(0)
        raise ConfigError("replica r-0 has another supervisor")

    async with supervised(Starter(), adopt) as supervisor:
        await is_asked.wait()
    assert supervisor.report.state is SupervisedState.STOPPED


async def test_a_replica_that_belongs_to_another_supervisor_is_neither_started_nor_tried_again() -> None:
    async def adopt(config: ReplicaConfig) -> ReplicaProcess:
        raise ConfigError("replica r-0 has another supervisor")

    starter = Starter()
    async with supervised(starter, adopt) as supervisor:
        assert (await until(supervisor, SupervisedState.FAILED)).error == "replica r-0 has another supervisor"
    assert not starter.started


async def test_a_replica_that_another_supervisor_takes_is_given_up() -> None:
    starter = Starter()
    async with supervised(starter) as supervisor:
        first = await until(supervisor, SupervisedState.RUNNING)
        starter.started[0].be_taken()
        told = await until(supervisor, SupervisedState.FAILED, first.version)
        assert "has another supervisor" in told.error
        assert not starter.started[0].is_stopped
    assert len(starter.started) == 1
