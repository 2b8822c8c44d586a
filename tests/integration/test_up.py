"""`tandem up` as a user runs it: ready, used, stopped in every way, and nothing left behind. And what goes wrong at the start."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tandem.cleanup import processes_of
from tests.integration.platform_run import SMALL, TANDEM, Run, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ANY_PORTS = ("--port=0", "--http-port=0")


@pytest.fixture
def user() -> Iterator[Path]:
    """A user's runtime folder, with a short name: sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="td", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def up(user: Path) -> Iterator[Callable[..., Run]]:
    """Starts `tandem up`, waits until it is ready, ends it after the test."""
    started: list[Run] = []

    def start(*arguments: str) -> Run:
        run = Run(user, *ANY_PORTS, *SMALL, *arguments)
        started.append(run)
        return run.wait_ready()

    yield start
    for run in started:
        run.end()


def is_clean(cluster: str, user: Path) -> bool:
    """No process, no socket, no file of the cluster is left."""
    places = (Path(f"/dev/shm/tandem-{cluster}"), Path(f"/tmp/tandem-ray-{cluster}"), user / "tandem" / cluster)
    files = [*places, user / "tandem" / f"{cluster}.json"]
    return not processes_of(cluster) and not any(path.exists() for path in files)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_leaves_nothing(up: Callable[..., Run], user: Path, number: int) -> None:
    run = up()
    assert set(run.counts()) >= {"redis", "router", "autoscaler", "node_agent", "zygote", "store", "actor", "replica", "engine_core"}
    answer = run.cli("generate", "The for statement", "--max-tokens=8")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert run.stop(number) == 0
    assert is_clean(run.cluster, user)


def test_up_killed_outright_is_cleaned_up_after(up: Callable[..., Run], user: Path) -> None:
    run = up()
    run.process.kill()
    run.process.wait()
    wait_for(lambda: is_clean(run.cluster, user), 30.0)


def test_down_clears_away_what_up_and_its_guard_left(up: Callable[..., Run], user: Path) -> None:
    run = up()
    for process in run.processes("guard"):
        psutil.Process(process.pid).kill()
    run.process.kill()
    run.process.wait()
    answer = run.cli("down")
    assert answer.returncode == 0, answer.stderr
    assert is_clean(run.cluster, user)


def test_two_clusters_do_not_meet_and_one_id_is_taken_once(up: Callable[..., Run], user: Path) -> None:
    first, second = up("--cluster=one", "--prefill=0"), up("--cluster=two", "--prefill=0")
    for run in (first, second):
        with run.client() as client:
            assert len(client.generate([5, 6, 7], max_tokens=2, temperature=0).token_ids) == 2
            assert len(client.status().replicas) == 1
    line = fails(user, "--cluster=one", *ANY_PORTS)
    assert "tandem down --cluster one" in line
    assert first.process.poll() is None
    assert first.cli("down", "--cluster", "two").returncode == 0
    assert is_clean("two", user)
    with first.client() as client:
        assert client.generate([5, 6, 7], max_tokens=2, temperature=0).token_ids


def test_every_listener_is_on_loopback(up: Callable[..., Run]) -> None:
    run = up("--routers=2", "--autoscalers=2")
    addresses = {
        connection.laddr.ip
        for process in run.processes()
        for connection in psutil.Process(process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def fails(user: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """One line, exit status 2, nothing left; returns the line."""
    is_named = any(argument.startswith("--cluster") for argument in arguments)
    cluster = f"f-{secrets.token_hex(4)}"
    named = arguments if is_named else (*arguments, f"--cluster={cluster}")
    run = Run(user, *named, environment=environment, log=user / "fails.log")
    assert run.process.wait(timeout=150) == 2, run.words
    lines = [line for line in run.words.strip().splitlines() if line.startswith("tandem: error: ")]
    assert len(lines) == 1, run.words
    assert is_clean(cluster, user)
    return lines[0]


def test_a_folder_that_does_not_exist(user: Path) -> None:
    assert "no such folder" in fails(user, "--model", str(user / "nothing"))


def test_a_model_folder_without_weights(user: Path) -> None:
    (user / "config.json").write_text("{}")
    assert "no weights" in fails(user, "--model", str(user))


def test_a_model_that_vllm_refuses(user: Path) -> None:
    folder = user / "refused"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert "vLLM cannot serve" in fails(user, *ANY_PORTS, "--model", str(folder))


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_port_in_use(user: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other = "--http-port=0" if flag == "--port" else "--port=0"
        line = fails(user, f"{flag}={taken.getsockname()[1]}", other)
    assert "in use" in line
    assert flag in line


def test_a_redis_that_is_not_there(user: Path) -> None:
    assert "REDIS_URL" in fails(user, *ANY_PORTS, environment={"REDIS_URL": "redis://127.0.0.1:1/0"})
    assert "REDIS_URL" in fails(user, *ANY_PORTS, environment={"REDIS_URL": "nonsense"})


def test_a_ray_that_is_not_there(user: Path) -> None:
    line = fails(user, *ANY_PORTS, environment={"RAY_ADDRESS": "127.0.0.1:1"})
    assert "RAY_ADDRESS needs a REDIS_URL" in line


def test_a_ray_that_does_not_answer(user: Path) -> None:
    environment = {"RAY_ADDRESS": "127.0.0.1:1", "REDIS_URL": "redis://127.0.0.1:1/0"}
    assert "RAY_ADDRESS '127.0.0.1:1': no Ray cluster answers there" in fails(user, *ANY_PORTS, environment=environment)
    assert "is not HOST:PORT" in fails(user, *ANY_PORTS, environment={**environment, "RAY_ADDRESS": "auto"})


def test_more_replicas_than_cpus(user: Path) -> None:
    assert "CPUs and this machine has" in fails(user, *ANY_PORTS, f"--decode={5 * (os.cpu_count() or 1)}")


def test_what_a_killed_run_left_is_no_cluster_that_runs(user: Path) -> None:
    cluster = f"left-{secrets.token_hex(3)}"
    (user / "tandem" / cluster / "redis").mkdir(parents=True)
    Path(f"/dev/shm/tandem-{cluster}").mkdir()
    line = fails(user, *ANY_PORTS, f"--cluster={cluster}", environment={"REDIS_URL": "nonsense"})
    assert "REDIS_URL" in line  # and not that it runs already
    assert is_clean(cluster, user)


def test_more_replicas_than_memory_holds(user: Path) -> None:
    line = fails(user, *ANY_PORTS, "--decode=4", f"--kv-cache-bytes={psutil.virtual_memory().total // 3}")
    assert "MiB of memory" in line


def test_no_room_for_blocks(user: Path) -> None:
    small = user / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        line = fails(user, *ANY_PORTS, "--store-dir", str(small / "blocks"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "no room for KV blocks" in line


def test_unknown_keys_name_the_nearest(user: Path) -> None:
    for text, nearest in (("prot = 1", "port"), ("[[models]]\ndecodes = 1", "decode"), ("[scaler]\nidle = 1.0", "idle_s")):
        (user / "cluster.toml").write_text(text)
        assert f"'{nearest}'" in fails(user, "--config", str(user / "cluster.toml"))


def test_vllm_not_installed(user: Path) -> None:
    hidden = "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
    hidden += "        if name == 'vllm': raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Hide())\n"
    (user / "sitecustomize.py").write_text(hidden)
    line = fails(user, environment={"PYTHONPATH": str(user)})
    assert "vLLM is not installed" in line
    assert "requirements/cpu.txt" in line


def test_down_says_what_there_is(user: Path) -> None:
    run = subprocess.run([*TANDEM, "down"], capture_output=True, text=True, env={"XDG_RUNTIME_DIR": str(user), "HOME": str(user)})
    assert run.returncode == 2
    assert re.match(r"tandem: error: no cluster", run.stderr)
    assert json.dumps(run.stdout) == '""'
