"""Programs and replicas that do not start, or are gone when they are to be ended: one ConfigError, nothing left."""

import asyncio
import sys
from pathlib import Path

import pytest

from tandem import launch
from tandem.config import EngineConfig, ReplicaConfig
from tandem.errors import ConfigError, Reason
from tandem.launch import ReplicaProcess, spawn_replica, start_program
from tests.layers import ROOT

pytestmark = pytest.mark.integration

MUTE = """
import sys, time
print("cannot reach the moon", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mute_program.py").write_text(MUTE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return "mute_program"


def config(folder: Path) -> ReplicaConfig:
    return ReplicaConfig(
        replica_id="r-0", role="decode", incarnation=1, served_model="m", engine=EngineConfig(), log_path=str(folder / "r-0.log")
    )


async def test_a_program_that_does_not_get_ready_in_time_is_ended_and_quoted(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_PROGRAM_START_S", 1.0)
    with pytest.raises(ConfigError, match="mute_program did not start in 1 s: cannot reach the moon") as caught:
        await start_program([program], tmp_path / "log", ready="ready")
    assert caught.value.reason is Reason.START_FAILED


@pytest.mark.parametrize("is_replica", [False, True])
async def test_a_process_that_cannot_be_made_is_a_config_error(is_replica: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ConfigError, match=r"could not be started: .*No such file") as caught:
        await (spawn_replica(config(tmp_path)) if is_replica else start_program(["p"], tmp_path / "log", ready="ready"))
    assert caught.value.reason is Reason.START_FAILED


async def test_a_log_that_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not be started: .*No such file"):
        await start_program(["p"], tmp_path / "gone" / "log", ready="ready")


async def test_a_replica_whose_process_is_gone_unseen_is_ended_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STOP_S", 0.0)
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), tmp_path / "s")
    replica = ReplicaProcess(config(tmp_path), *await asyncio.open_unix_connection(tmp_path / "s"))
    replica.pid = gone.pid
    async with asyncio.timeout(10.0):
        await replica.stop()
    assert replica.exited.done()
    server.close()
