"""A daemon is kept alive whoever starts it, is found again by its file, and is left in peace once all is over."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tandem.daemon import Daemon, keep_alive
from tandem.node_folder import ENDED, NodeFolder
from tests.integration.router_shell import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFolder:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = NodeFolder("daemons", "n")
    made.make()
    return made


def sleeper(folder: NodeFolder) -> Daemon:
    command = [sys.executable, "-m", "tests.integration.daemon_that_sleeps"]
    return Daemon(name="sleeper", cluster="daemons", command=command, pid_file=folder.path / "sleeper.pid", log=folder.log("sleeper"))


async def test_it_is_started_again_until_its_cluster_has_ended(folder: NodeFolder) -> None:
    daemon = sleeper(folder)
    keeping = asyncio.create_task(keep_alive(daemon, lambda: folder.is_ended))
    await eventually(daemon.try_pid)
    first = daemon.try_pid()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: daemon.try_pid() not in (None, first))
    second = daemon.try_pid()
    assert second is not None
    (folder.path.parent / ENDED).touch()
    os.kill(second, signal.SIGKILL)
    await asyncio.wait_for(keeping, 10.0)
    assert daemon.try_pid() is None


async def test_a_successor_finds_it_and_ends_it(folder: NodeFolder) -> None:
    pid = await sleeper(folder).start()
    successor = sleeper(folder)
    await eventually(lambda: successor.try_pid() == pid)
    await successor.stop()
    assert successor.try_pid() is None


async def test_without_its_folder_nothing_is_started(folder: NodeFolder) -> None:
    folder.path.rmdir()
    await asyncio.wait_for(keep_alive(sleeper(folder), lambda: folder.is_ended), 10.0)
    assert not folder.path.exists()
