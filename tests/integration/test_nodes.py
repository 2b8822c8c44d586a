"""A Ray cluster that is there already, of two nodes: agent, zygote and store service on each, a hand-off between them, a node lost."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.domain import Role
from tandem.node_folder import ENDED
from tandem.redis_server import find_redis_server
from tests.integration.platform_run import SMALL, Run, ready, wait_for
from tests.layers import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class RayNodes:
    """Two Ray nodes in a process of their own."""

    def __init__(self, folder: Path) -> None:
        with (folder / "ray.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.two_ray_nodes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
            )
        self.address = self._line("nodes ready").partition("address=")[2].strip()

    def say(self, word: str, answer: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._line(answer)

    def actors(self) -> list[str]:
        """What actors run in it."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        names = list[str]()
        for process in processes:
            with contextlib.suppress(psutil.Error):  # it has just ended
                names += process.cmdline()[:1]
        return [name for name in names if name.startswith(("ray::PrefillActor", "ray::DecodeActor", "ray::NodeAgent"))]

    def _line(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError(f"the Ray nodes ended before {start!r}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture
def user() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="td", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_url(user: Path) -> Iterator[str]:
    """A Redis on TCP, as other machines would reach it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (user / "redis.log").open("wb") as log:
        server = subprocess.Popen([find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""], stdout=log, cwd=user)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture
def nodes(user: Path) -> Iterator[RayNodes]:
    made = RayNodes(user)
    yield made
    with contextlib.suppress(subprocess.TimeoutExpired):
        made.close()


def test_two_nodes_share_blocks_and_one_may_be_lost(user: Path, redis_url: str, nodes: RayNodes) -> None:
    environment = {"RAY_ADDRESS": nodes.address, "REDIS_URL": redis_url}
    run = Run(user, "--port=0", "--http-port=0", *SMALL, environment=environment)
    try:
        run.wait_ready()
        with run.client() as client:
            leases = {replica.lease.role: replica.lease for replica in client.status().replicas}
            assert leases[Role.PREFILL].node != leases[Role.DECODE].node
            folder = user / "tandem" / run.cluster
            assert len(list(folder.glob("*/zygote.sock"))) == len(list(folder.glob("*/node.json"))) == 2
            prompt = [(7 * number) % 2000 + 3 for number in range(500)]
            completion = client.generate(prompt, max_tokens=16, temperature=0)
            assert completion.receipt is not None
            assert completion.receipt.handed_off
            assert len(nodes.actors()) == 4  # two replicas', two agents
            assert completion.receipt.kv_bytes_shipped >= 15 * 65536
            again = client.generate(prompt, max_tokens=16, temperature=0)
            assert again.token_ids == completion.token_ids
            nodes.say("remove", "nodes removed")
            # Its replica serves on without a supervisor, until another one takes its name elsewhere.
            assert client.generate(prompt, max_tokens=16, temperature=0).token_ids == completion.token_ids
            wait_for(lambda: len({replica.lease.node for replica in client.status().replicas}) == 1, 90.0)
            wait_for(lambda: len(ready(client.status())) == 2, 90.0)
            assert client.generate(prompt, max_tokens=16, temperature=0).token_ids == completion.token_ids
        (autoscaler,) = run.processes("autoscaler")
        os.kill(autoscaler.pid, signal.SIGSTOP)
        (folder / ENDED).touch()  # as clean-up does: what Ray does not tell an agent it sees by that
        for store in run.processes("store"):  # the lost node's outlives its agent for a while
            os.kill(store.pid, signal.SIGKILL)
        wait_for(lambda: not any("NodeAgent" in name for name in nodes.actors()))
        os.kill(autoscaler.pid, signal.SIGCONT)
        assert run.stop(timeout_s=100.0) == 0
        assert not run.processes()
        wait_for(lambda: not nodes.actors())  # it is not ours and goes on
        assert not folder.exists()
        assert not list(Path("/dev/shm").glob(f"tandem-{run.cluster}/**/*"))
    finally:
        run.end()
