"""`python -m router` as a process: one ready line, a clean stop, and one line of help where it cannot start."""

import asyncio
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import aiohttp
import pytest

from router import http as router_http
from router import http_calls
from tandem import cleanup
from tandem.redis_register import RedisRegister
from tests.integration.fake_worker import Faults, serve_workers
from tests.layers import ROOT
from tests.redis_process import running_redis

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


async def _until(register: RedisRegister, *, has_router: bool) -> None:
    async with asyncio.timeout(30), aclosing(register.snapshots(0.05)) as snapshots:
        async for snapshot in snapshots:
            if bool(snapshot.members) is has_router:
                return


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "router", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(number: signal.Signals) -> None:
    with _router("--worker", "127.0.0.1:1") as (process, _, _):
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err


async def test_the_lease_is_given_back_before_running_answers_have_ended(tmp_path: Path) -> None:
    async with running_redis(tmp_path) as redis, serve_workers(decode_0=Faults(hang_at=0)) as workers:
        worker, register = workers["decode_0"], RedisRegister(redis.url, "c")
        assert worker.server is not None
        flags = ("--redis-url", redis.url, "--cluster", "c", "--worker", worker.server.address)
        with _router(*flags) as (process, _, http):
            async with aiohttp.ClientSession() as session:
                body = {"prompt": [1, 2, 3], "max_tokens": 4}
                asking = asyncio.create_task(session.post(f"http://{http}/v1/completions", json=body))
                await asyncio.wait_for(worker.hangs.wait(), 30)
                await _until(register, has_router=True)
                process.terminate()
                await _until(register, has_router=False)
                assert not asking.done()
                async with await asking as answer:
                    assert answer.status == 503
            assert await asyncio.to_thread(process.wait, 30) == 0
        await register.close()


def test_a_stop_is_over_before_the_cluster_kills_what_is_left() -> None:
    assert router_http._SHUTDOWN_GRACE_S + http_calls._LAST_WORDS_S + router_http._CLEANUP_S <= cleanup._ROUTER_GRACE_S - 0.2


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
