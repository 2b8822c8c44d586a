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
from tandem.tenancy import hash_key
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
def up(user: Path) -> Iterator[Callable[..., list[Run]]]:
    """Starts a `tandem up` for each list of arguments, waits until all are ready, ends them after the test."""
    started: list[Run] = []

    def start(*runs: tuple[str, ...]) -> list[Run]:
        started.extend(Run(user, *ANY_PORTS, *SMALL, *arguments) for arguments in runs)
        return [run.wait_ready() for run in started]

    yield start
    for run in started:
        run.end()


def is_clean(cluster: str, user: Path) -> bool:
    """No process, no socket, no file of the cluster is left."""
    places = (Path(f"/dev/shm/tandem-{cluster}"), Path(f"/tmp/tandem-ray-{cluster}"), user / "tandem" / cluster)
    files = [*places, user / "tandem" / f"{cluster}.json"]
    return not processes_of(cluster) and not any(path.exists() for path in files)


def test_up_serves_and_leaves_nothing(up: Callable[..., list[Run]], user: Path) -> None:
    (run,) = up(())
    assert set(run.counts()) >= {"redis", "router", "autoscaler", "node_agent", "zygote", "store", "actor", "replica", "engine_core"}
    answer = run.cli("generate", "The for statement", "--max-tokens=8")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert run.stop(signal.SIGINT) == 0
    assert is_clean(run.cluster, user)


def test_two_clusters_do_not_meet_and_each_is_cleaned_up_after_however_it_ends(up: Callable[..., list[Run]], user: Path) -> None:
    first, second = up(("--cluster=one",), ("--cluster=two",))
    for run in (first, second):
        with run.client() as client:
            assert len(client.generate([5, 6, 7], max_tokens=2, temperature=0).token_ids) == 2
            assert len(client.status().replicas) == 2
    assert "tandem down --cluster one" in fails(user, "--cluster=one", *ANY_PORTS)
    assert first.process.poll() is None
    for process in second.processes("guard"):  # nobody of the second is left to clean up
        psutil.Process(process.pid).kill()
    second.process.kill()
    second.process.wait()
    assert "two" in first.cli("down").stderr  # which of the two?
    assert first.cli("down", "--cluster", "two").returncode == 0
    assert is_clean("two", user)
    with first.client() as client:
        assert client.generate([5, 6, 7], max_tokens=2, temperature=0).token_ids
    first.process.kill()
    first.process.wait()
    wait_for(lambda: is_clean("one", user), 30.0)  # by its guard


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


def test_tenants_need_their_keys_no_command_line_shows_one_and_all_listen_on_loopback(up: Callable[..., list[Run]], user: Path) -> None:
    path = user / "tenants.toml"
    path.write_text(
        '[[models]]\nprefill = 0\ndecode = 1\n[tenants.alice]\nkeys = ["sk-alice"]\noutput_tokens_per_minute = 60\n'
        '[tenants.ops]\nkeys = ["sk-ops"]\nis_operator = true\n'
    )
    (run,) = up((f"--config={path}", "--routers=2", "--autoscalers=2"))
    addresses = {
        connection.laddr.ip
        for process in run.processes()
        for connection in psutil.Process(process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    lines = " ".join(word for process in run.processes() for word in psutil.Process(process.pid).cmdline())
    assert "sk-" not in lines
    assert hash_key("sk-alice") not in lines
    assert run.cli("status").returncode == 0
    refused = run.cli("generate", "hello")
    assert (refused.returncode, "an API key is needed" in refused.stderr) == (2, True)
    run.environment["TANDEM_API_KEY"] = "sk-alice"
    assert run.cli("generate", "hello", "--max-tokens", "200").returncode == 0
    refused = run.cli("generate", "hello")
    assert (refused.returncode, "tenant 'alice' is over its quota" in refused.stderr) == (2, True)
    refused = run.cli("scale", "decode=1")
    assert (refused.returncode, "is no operator" in refused.stderr) == (2, True)
    run.environment["TANDEM_API_KEY"] = "sk-ops"
    assert run.cli("scale", "decode=1", "--for-s", "60").returncode == 0
    assert "sk-" not in run.words
    assert run.stop(signal.SIGTERM) == 0
    assert is_clean(run.cluster, user)
