"""`python -m kv_transfer` as a process: one ready line, a clean stop, and one line of help where it cannot start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kv_transfer.arena_store import ArenaStore
from kv_transfer.arena_upkeep import Census
from kv_transfer.published import PUBLISHED_SOCKET
from tests.layers import ROOT

pytestmark = pytest.mark.integration

READY = re.compile(r"store ready address=127\.0\.0\.1:(\d+) metrics=(127\.0\.0\.1:\d+)\n")
COMMAND = (sys.executable, "-m", "kv_transfer", "--capacity-bytes", str(64 << 20))


@contextmanager
def _store(folder: Path, *arguments: str, inherited: int = 1) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    process = subprocess.Popen(
        [*COMMAND, "--store-dir", str(folder), *arguments],
        cwd=ROOT,
        pass_fds=(inherited,),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = READY.fullmatch(process.stdout.readline())
        assert ready is not None
        yield process, ready[1], ready[2]
    finally:
        process.kill()
        process.communicate()


def _soon(condition: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + 10.0
    while not condition() and time.monotonic() < ends_s:
        time.sleep(0.02)
    return condition()


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with _store(tmp_path / "store") as (process, _, _):
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err


def test_the_end_of_its_lifeline_stops_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, _store(tmp_path / "store", f"--lifeline-fd={theirs.fileno()}", inherited=theirs.fileno()) as (process, _, _):
        theirs.close()
        ours.sendall(b"still here\n")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        ours.close()
        assert process.wait(timeout=30) == 0


def test_it_opens_nothing_of_its_folder_but_the_arena_and_its_locks(tmp_path: Path) -> None:
    with _store(tmp_path / "store") as (process, _, _):
        links = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd")}
        names = {Path(link).name for link in links if link.startswith(str(tmp_path))}
    assert names == {"arena", "lock"}  # no writer's number: it has put nothing


def test_it_ends_with_its_slots_given_back_and_no_socket_left(tmp_path: Path) -> None:
    with _store(tmp_path / "store") as (process, _, _):
        assert (tmp_path / "store" / PUBLISHED_SOCKET).is_socket()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert not (tmp_path / "store" / PUBLISHED_SOCKET).exists()
    with closing(ArenaStore(tmp_path / "store", capacity_bytes=1)) as store:
        assert store.upkeep.census() == Census(granted_slots=0, leased_blocks=0, leaked_slots=0)
        assert store.stats().capacity_bytes == 64 << 20


def test_its_metrics_are_served(tmp_path: Path) -> None:
    with _store(tmp_path / "store") as (_, _, metrics), urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    for line in ("tandem_store_blocks 0.0", "tandem_store_used_bytes 0.0", "tandem_store_capacity_bytes 6.7108864e+07"):
        assert line in lines
    for name in ("granted_slots", "leased_blocks", "leaked_slots"):
        assert f"tandem_store_{name} 0.0" in lines
    for name in (
        "bad_requests",
        "bad_answers",
        "fetched_blocks",
        "fetched_bytes",
        "served_blocks",
        "served_bytes",
        "corrupt_blocks",
        "evicted_blocks",
    ):
        assert f"tandem_store_{name}_total 0.0" in lines


def test_a_taken_port_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    folder = ("--store-dir", str(tmp_path / "store"))
    with _store(tmp_path / "store") as (_, port, metrics):
        taken = _run(*folder, "--port", port)
        assert (taken.returncode, taken.stdout) == (2, "")
        assert taken.stderr == f"store: port {port} on 127.0.0.1 is in use or not allowed: choose another port\n"
        taken = _run(*folder, "--metrics-port", metrics.rpartition(":")[2])
        assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
        assert "--metrics-port" in taken.stderr


def test_a_service_that_comes_back_takes_the_port_it_had(tmp_path: Path) -> None:
    file = tmp_path / "store.address"
    ports = []
    for _ in range(2):
        with _store(tmp_path / "store", f"--address-file={file}") as (process, port, _):
            ports.append(port)
            assert _soon(lambda port=port: file.exists() and file.read_text() == f"127.0.0.1:{port}")  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
    assert ports[0] == ports[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{taken}", "127.0.0.1:70000", "nonsense"])
def test_a_last_port_that_cannot_be_had_is_given_up_for_a_free_one(tmp_path: Path, address: str) -> None:
    file = tmp_path / "store.address"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        file.write_text(address.format(taken=taken))
        with _store(tmp_path / "store", f"--address-file={file}") as (_, port, _):
            assert port != str(taken)
            assert _soon(lambda: file.read_text() == f"127.0.0.1:{port}")


def test_a_port_that_was_asked_for_is_never_given_up(tmp_path: Path) -> None:
    file = tmp_path / "store.address"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        file.write_text(f"127.0.0.1:{taken}")
        refused = _run("--store-dir", str(tmp_path / "store"), f"--address-file={file}", f"--port={taken}")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--store-dir", ""), "--store-dir must name a folder"),
        (("--store-dir", "s", "--capacity-bytes", "5"), "--capacity-bytes must be at least 1048576, got 5"),
        (("--store-dir", "s", "--port", "70000"), "--port must be from 0 to 65535, got 70000"),
        (("--store-dir", "s", "--lifeline-fd", "77"), "--lifeline-fd 77 is no open descriptor"),
        (("--store-dir", "/proc/nowhere"), "no room for KV blocks in /proc"),
    ],
)
def test_a_bad_setting_is_one_line(arguments: tuple[str, ...], text: str) -> None:
    refused = _run(*arguments)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith(f"store: {text}")
