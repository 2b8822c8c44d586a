"""One replica, its zygote and its supervisors as processes around an engine of a few lines, for tests of who owns it."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from tandem.adoption import try_adopt
from tandem.config import EngineConfig, ReplicaConfig
from tandem.supervisor import ReplicaSupervisor, SupervisedState, SupervisorReport
from tandem.zygote_client import ZygoteClient
from tests.layers import ROOT

WAIT_S = 40.0
ZYGOTE = """
import asyncio, contextlib, pathlib, signal, socket, sys, time
import tandem.replica
from tandem.domain import Namespace
from tandem.tether import Tether
from tandem.zygote import Zygote
from tests.fake_engine import FakeEngine

class SlowEngine(FakeEngine):
    async def generate(self, request):
        async with contextlib.aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                yield output
                await asyncio.sleep(0.03)

def build(config):
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))  # its event loop hangs
    return SlowEngine(), Namespace("n")

tandem.replica.build_engine = build
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("zygote ready", flush=True)
    Zygote(listener, Tether(pathlib.Path(sys.argv[2]), grace_s=0.5)).run()
"""
SUPERVISOR = """
import asyncio, json, pathlib, sys
from tandem.adoption import try_adopt
from tandem.config import replica_config_from_json
from tandem.supervisor import ReplicaSupervisor
from tandem.zygote_client import ZygoteClient, zygote_environment

async def main():
    supervisor = ReplicaSupervisor(
        replica_config_from_json(sys.argv[2]), ZygoteClient(pathlib.Path(sys.argv[1])).start_replica, adopt=try_adopt
    )
    supervisor.begin()
    version = 0
    while True:
        report = await supervisor.changed(version)
        version = report.version
        print(json.dumps(report.to_dict()), flush=True)

asyncio.run(main())
"""


class Node:
    """A zygote and the settings of one replica."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "zygote.sock"
        self.tether = folder / "agent.lock"
        self.config = ReplicaConfig(
            replica_id="r-0",
            role="decode",
            incarnation=0,
            served_model="m",
            engine=EngineConfig(model="bundled"),
            runtime_dir=str(folder),
            log_path=str(folder / "r-0.log"),
            orphan_s=20.0,
        )

    @property
    def log(self) -> str:
        return Path(self.config.log_path).read_text()

    def supervisor(self, **changes: object) -> ReplicaSupervisor:
        """One in this process."""
        config = replace(self.config, **changes)  # type: ignore[arg-type]
        return ReplicaSupervisor(config, ZygoteClient(self.socket).start_replica, adopt=try_adopt)

    @asynccontextmanager
    async def supervised(self, **changes: object) -> AsyncIterator[tuple[ReplicaSupervisor, SupervisorReport]]:
        supervisor = self.supervisor(**changes)
        supervisor.begin()
        try:
            yield supervisor, await until(supervisor, SupervisedState.RUNNING)
        finally:
            await supervisor.stop()

    @asynccontextmanager
    async def other_process(self) -> AsyncIterator["OtherSupervisor"]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SUPERVISOR, str(self.socket), self.config.to_json()), stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        try:
            yield OtherSupervisor(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class OtherSupervisor:
    """A supervisor in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def report(self) -> SupervisorReport:
        """Its next report."""
        assert self._process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            values = json.loads(await self._process.stdout.readline())
        return SupervisorReport(**{**values, "state": SupervisedState(values["state"])})

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()


async def until(supervisor: ReplicaSupervisor, state: SupervisedState, version: int = -1) -> SupervisorReport:
    async with asyncio.timeout(WAIT_S):
        report = await supervisor.changed(version)
        while report.state is not state:
            report = await supervisor.changed(report.version)
    return report


async def eventually(is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while not is_so():
        assert loop.time() - started_s < timeout_s, "it did not come to be so"
        await asyncio.sleep(0.02)
    return loop.time() - started_s


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
