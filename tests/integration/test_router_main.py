"""`python -m router` as a process: one ready line, a clean stop, and one line of help where it cannot start."""

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.layers import ROOT

pytestmark = pytest.mark.integration

READY = re.compile(r"router ready address=127\.0\.0\.1:(\d+) http=(127\.0\.0\.1:\d+)\n")


@contextmanager
def _router(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "--port", "0", "--http-port", "0", *arguments],
        cwd=ROOT,
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


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "router", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(number: signal.Signals) -> None:
    with _router("--worker", "127.0.0.1:1") as (process, _, _):
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err


def test_its_metrics_are_served() -> None:
    with _router() as (_, _, http), urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
        assert b"tandem_router_running_requests 0.0" in response.read()


def test_a_taken_port_is_one_line_that_says_what_to_do() -> None:
    with _router() as (_, port, http):
        taken = _run("--port", port)
        assert (taken.returncode, taken.stdout) == (2, "")
        assert taken.stderr == f"router: port {port} on 127.0.0.1 is in use or not allowed: choose another port\n"
        http_port = http.rpartition(":")[2]
        taken = _run("--port", "0", "--http-port", http_port)
        assert (taken.returncode, taken.stdout) == (2, "")
        assert taken.stderr == f"router: HTTP port {http_port} on 127.0.0.1 is in use or not allowed: choose another with --http-port\n"


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_one_line_too(port: str) -> None:
    refused = _run("--port", "0", "--http-port", port)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "--http-port" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--worker", "nowhere"), "--worker 'nowhere' is not HOST:PORT"),
        (("--max-queued-requests", "0"), "max_queued_requests must be at least 1, got 0"),
    ],
)
def test_a_bad_setting_is_one_line(arguments: tuple[str, ...], text: str) -> None:
    refused = _run("--port", "0", *arguments)
    assert (refused.returncode, refused.stderr) == (2, f"router: {text}\n")
