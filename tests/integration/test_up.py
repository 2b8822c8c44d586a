"""`tandem up` as a user runs it: ready, used, stopped in every way, and nothing left behind. And what goes wrong at the start."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

TANDEM = [str(Path(sys.executable).with_name("tandem"))]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user of their own: endpoint files of other clusters are not seen."""
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}


@pytest.fixture
def up(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `tandem up` and waits until it is ready; stops what a test leaves running."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*TANDEM, "up", "--port=0", *arguments], stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if "ready in" in line:
                break
        return process

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def all_gone(processes: list[psutil.Process], timeout_s: float) -> bool:
    ends_s = time.monotonic() + timeout_s
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > ends_s:
            return False
        time.sleep(0.05)
    return True


def store_folder(runtime_dir: Path) -> Path:
    """The folder of blocks of the one cluster whose endpoint file is here: other clusters may run on this machine."""
    (endpoint_file,) = (runtime_dir / "tandem").glob("*.json")
    return Path("/dev/shm") / f"tandem-{json.loads(endpoint_file.read_text())['cluster']}"


def shm_folders() -> set[Path]:
    return set(Path("/dev/shm").glob("tandem-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_leaves_nothing(
    up: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    process = up()
    folder = store_folder(tmp_path)
    assert folder.is_dir()
    processes = family(process)
    assert len(processes) >= 6  # zygote, two replicas with an engine each, router
    answer = subprocess.run([*TANDEM, "generate", "The for statement", "--max-tokens=8"], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    assert all_gone(processes, 5.0)
    assert not folder.exists()
    assert not list((tmp_path / "tandem").iterdir())


def test_up_killed_outright_takes_every_process_along(up: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = up()
    folder = store_folder(tmp_path)
    processes = family(process)
    process.kill()
    assert all_gone(processes, 10.0), [one for one in processes if one.is_running()]
    shutil.rmtree(folder)  # what `tandem down` will clean


def test_every_listener_is_on_loopback(up: Callable[..., subprocess.Popen[str]]) -> None:
    process = up()
    addresses = {
        connection.laddr.ip
        for one in [psutil.Process(process.pid), *family(process)]
        for connection in one.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def fails(environment: dict[str, str], *arguments: str) -> str:
    """One line on stderr, exit status 2, nothing left; returns the line."""
    before = shm_folders()
    result = subprocess.run([*TANDEM, "up", *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 2, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert re.match(r"tandem: error: \S", lines[0])
    assert shm_folders() == before
    return lines[0]


def test_a_folder_that_does_not_exist(environment: dict[str, str], tmp_path: Path) -> None:
    assert "no such folder" in fails(environment, "--model", str(tmp_path / "nothing"))


def test_a_model_folder_without_weights(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in fails(environment, "--model", str(tmp_path))


def test_a_model_that_vllm_refuses(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert "vLLM cannot serve" in fails(environment, "--model", str(tmp_path))


def test_a_port_in_use(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = fails(environment, f"--port={taken.getsockname()[1]}")
    assert "in use" in line
    assert "port" in line


def test_no_room_for_blocks(environment: dict[str, str], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        line = fails(environment, "--store-dir", str(small / "blocks"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "no room for KV blocks" in line


def test_vllm_not_installed(environment: dict[str, str], tmp_path: Path) -> None:
    hidden = "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
    hidden += "        if name == 'vllm': raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Hide())\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    line = fails({**environment, "PYTHONPATH": str(tmp_path)})
    assert "vLLM is not installed" in line
    assert "requirements/cpu.txt" in line
