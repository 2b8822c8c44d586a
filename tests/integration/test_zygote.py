"""The zygote and its supervisor's side: forks, failures and ends. It forks replicas that fail at once, so vLLM is not imported."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.config import EngineConfig, ReplicaConfig
from tandem.errors import ConfigError, Reason
from tandem.launch import spawn_replica
from tandem.tether import hold
from tandem.zygote_client import ZygoteClient
from tests.layers import ROOT

pytestmark = pytest.mark.integration

WAIT_S = 60.0
PROGRAM = """
import os, pathlib, socket, sys, threading
from tandem.tether import Tether
from tandem.zygote import Zygote
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("zygote ready", flush=True)
    exec(sys.argv[3])
    Zygote(listener, Tether(pathlib.Path(sys.argv[2]), grace_s=0.5)).run()
"""


class Forker:
    """A zygote that has imported next to nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket_path = folder / "zygote.sock"
        self.tether_path = folder / "agent.lock"
        self.tether = hold(self.tether_path)
        self.client = ZygoteClient(self.socket_path, wait_s=0.2)

    async def start(self, first: str = "") -> None:
        """`first` is Python that the zygote runs before it serves."""
        arguments = (str(self.socket_path), str(self.tether_path), first)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, *arguments, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        assert self.process.stdout is not None
        assert await self.process.stdout.readline() == b"zygote ready\n"

    async def say(self, request: bytes) -> list[str]:
        """All lines that come back for one request."""
        reader, writer = await asyncio.open_unix_connection(self.socket_path)
        writer.write(request)
        writer.write_eof()
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        return lines

    def config(self, **engine: Any) -> ReplicaConfig:
        return ReplicaConfig(
            replica_id="r-0",
            role="decode",
            incarnation=1,
            served_model="m",
            engine=replace(EngineConfig(), **engine),
            runtime_dir=str(self.folder),
            log_path=str(self.folder / "r-0.log"),
        )

    async def restart(self, first: str = "") -> None:
        """Another zygote in this one's place."""
        await self.kill()
        self.socket_path.unlink()
        await self.start(first)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@pytest.fixture
async def forker(tmp_path: Path) -> AsyncIterator[Forker]:
    made = Forker(tmp_path)
    await made.start()
    yield made
    await made.kill()


@pytest.mark.parametrize(
    "request_line",
    [b"", b"no end of line", b"\n", b"not JSON\n", b"null\n", b"[]\n", b"{}\n", b'{"engine": 1}\n', b"\xff\n", b"x" * 70_000 + b"\n"],
    ids=["nothing", "unended", "blank", "text", "null", "list", "empty", "bad engine", "bytes", "too long"],
)
async def test_a_bad_request_is_answered_and_the_next_one_served(forker: Forker, request_line: bytes) -> None:
    for _ in range(2):
        lines = await forker.say(request_line)
        assert len(lines) == 1
        assert lines[0].startswith("replica failed bad request to the zygote")
    assert forker.process.returncode is None


async def test_a_caller_that_leaves_at_once_does_no_harm(forker: Forker) -> None:
    _, writer = await asyncio.open_unix_connection(forker.socket_path)
    writer.transport.abort()
    assert (await forker.say(b"{}\n"))[0].startswith("replica failed")


async def test_a_replica_that_cannot_start_says_why(forker: Forker) -> None:
    replica = await forker.client.start_replica(forker.config(faults="nonsense=1"))
    with pytest.raises(ConfigError, match="no site 'nonsense'") as caught:
        await replica.wait_ready()
    assert caught.value.reason is Reason.START_FAILED
    await replica.stop()


async def test_a_forked_replica_is_reaped_with_its_status(forker: Forker) -> None:
    lines = await forker.say(f"{forker.config(faults='nonsense=1').to_json()}\n".encode())
    assert [line.split()[0] for line in lines] == ["pid", "replica", "exit"]
    assert lines[-1] == "exit 2"


async def test_a_replica_that_crashes_leaves_its_words_in_its_log(forker: Forker) -> None:
    replica = await forker.client.start_replica(forker.config(faults=3))
    with pytest.raises(ConfigError, match=r"ended while starting: AttributeError: .*; its log is .*r-0\.log"):
        await replica.wait_ready()
    await replica.stop()
    log = (forker.folder / "r-0.log").read_text()
    assert "Traceback" in log
    assert "AttributeError" in log


async def test_the_end_of_its_tether_ends_it(forker: Forker) -> None:
    assert forker.tether is not None
    os.close(forker.tether)
    async with asyncio.timeout(WAIT_S):
        assert await forker.process.wait() == 0


async def test_sigterm_ends_it(forker: Forker) -> None:
    await forker.say(b"{}\n")  # it runs
    forker.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(WAIT_S):
        assert await forker.process.wait() == 0


async def test_a_replica_is_spawned_where_the_zygote_is_gone(forker: Forker) -> None:
    forker.process.kill()
    await forker.process.wait()
    replica = await forker.client.start_replica(forker.config(faults="nonsense=1"))
    assert replica.pid > 0
    with pytest.raises(ConfigError, match="no site 'nonsense'"):
        await replica.wait_ready()
    await replica.stop()


TWO_THREADS = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
NO_FORK = "def refuse(): raise OSError(11, 'no room for a process')\nos.fork = refuse"


async def test_a_zygote_with_threads_makes_room_for_another_and_the_replica_is_spawned(forker: Forker) -> None:
    await forker.restart(TWO_THREADS)
    replica = await forker.client.start_replica(forker.config(faults="nonsense=1"))
    assert replica.pid > 0
    with pytest.raises(ConfigError, match="no site 'nonsense'"):
        await replica.wait_ready()
    await replica.stop()
    async with asyncio.timeout(WAIT_S):
        assert await forker.process.wait() == 0


async def test_a_fork_that_fails_is_told_and_the_zygote_lives_on(forker: Forker) -> None:
    await forker.restart(NO_FORK)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"the zygote cannot fork: .*no room for a process") as caught:
            await forker.client.start_replica(forker.config())
        assert caught.value.reason is Reason.START_FAILED
    assert forker.process.returncode is None


async def test_a_zygote_that_comes_back_in_time_forks_the_replica(forker: Forker, caplog: pytest.LogCaptureFixture) -> None:
    forker.client = ZygoteClient(forker.socket_path, wait_s=WAIT_S)
    await forker.kill()  # its socket is still there, and refuses
    starting = asyncio.create_task(forker.client.start_replica(forker.config(faults="nonsense=1")))
    await asyncio.sleep(0.3)
    assert not starting.done()
    forker.socket_path.unlink()
    await forker.start()
    replica = await starting
    assert "zygote_gone" not in caplog.text
    with pytest.raises(ConfigError, match="no site 'nonsense'"):
        await replica.wait_ready()
    await replica.stop()


async def test_a_zygote_that_ends_without_a_word_is_waited_for_and_then_done_without(forker: Forker) -> None:
    await forker.restart("Zygote._fork_for = lambda self, connection: connection.close()")
    replica = await forker.client.start_replica(forker.config(faults="nonsense=1"))
    with pytest.raises(ConfigError, match="no site 'nonsense'"):
        await replica.wait_ready()
    await replica.stop()


async def test_a_spawned_replica_that_cannot_start_says_why(tmp_path: Path) -> None:
    replica = await spawn_replica(Forker(tmp_path).config(faults="nonsense=1"))
    with pytest.raises(ConfigError, match="no site 'nonsense'"):
        await replica.wait_ready()
    await replica.stop()
    assert replica.exited.done()
