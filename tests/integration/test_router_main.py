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
from router.policies import POLICIES
from router.replay import replay
from tandem import cleanup
from tandem.redis_register import RedisRegister
from tandem.tenancy import Tenant, hash_key
from tandem.tenant_config import TENANTS_VARIABLE, tenants_to_json
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
        (("--queue-order", "best"), "queue_order must be slack or shortest, got 'best'"),
        (("--policy", "best"), f"policy must be one of: {', '.join(POLICIES)}; got 'best'"),
    ],
)
def test_a_bad_setting_is_one_line(arguments: tuple[str, ...], text: str) -> None:
    refused = _run("--port", "0", *arguments)
    assert (refused.returncode, refused.stderr) == (2, f"router: {text}\n")


async def test_the_log_of_a_killed_router_replays_to_the_same_decisions(tmp_path: Path) -> None:
    faults = {"prefill_0": Faults(), "decode_0": Faults(error_at=3), "decode_1": Faults()}
    path = tmp_path / "logs" / "router.events"
    async with serve_workers(**faults) as workers:
        addresses = [f"--worker={worker.server.address}" for worker in workers.values() if worker.server is not None]
        with _router(*addresses, f"--event-log={path}", "--one-worker-max-tokens=0") as (process, _, http):
            async with aiohttp.ClientSession() as session:

                async def ask(number: int) -> int:
                    body = {"prompt": list(range(1, 40 + number)), "max_tokens": 6}
                    async with session.post(f"http://{http}/v1/completions", json=body) as answer:
                        await answer.read()
                        return answer.status

                assert {await ask(0), *await asyncio.gather(*map(ask, range(1, 30)))} == {200}
            await asyncio.sleep(0.5)
            process.kill()
            await asyncio.to_thread(process.wait, 30)
    command = [sys.executable, "-m", "router.replay", str(path)]
    replayed = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert re.search(r"^\d{3,} events, the same answers$", replayed.stdout, re.MULTILINE)
    assert path.read_bytes().count(b"\xa6submit") == 30


async def test_a_router_that_stops_writes_its_log_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "router.events"
    with _router(f"--event-log={path}") as (process, _, _):
        await asyncio.sleep(0.6)  # two ticks of an idle router
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0
    found = replay(path)
    assert (found.difference, found.is_cut_off, found.events > 0) == (None, False, True)


def test_an_event_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = _run("--port", "0", f"--event-log={tmp_path / 'file' / 'log'}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "cannot write the event log" in refused.stderr


async def test_tenants_come_through_the_environment_and_their_quotas_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tenant = Tenant(name="alice", key_sha256=(hash_key("sk-alice"),), prompt_tokens_per_minute=60)
    monkeypatch.setenv(TENANTS_VARIABLE, tenants_to_json([tenant]))
    async with running_redis(tmp_path) as redis, serve_workers(decode_0=Faults()) as workers:
        worker = workers["decode_0"]
        assert worker.server is not None
        flags = ("--redis-url", redis.url, "--cluster", "c", "--worker", worker.server.address)
        with _router(*flags) as (_, _, http):
            async with aiohttp.ClientSession() as session:

                async def ask(key: str) -> aiohttp.ClientResponse:
                    body, headers = {"prompt": list(range(1, 101)), "max_tokens": 2}, {"Authorization": f"Bearer {key}"}
                    async with session.post(f"http://{http}/v1/completions", json=body, headers=headers) as answer:
                        await answer.read()
                        return answer

                assert (await ask("sk-bob")).status == 401
                assert (await ask("sk-alice")).status == 200
                answer = await ask("sk-alice")
                assert answer.status == 429
                assert int(answer.headers["Retry-After"]) >= 1
                async with session.get(f"http://{http}/metrics") as metrics:
                    text = await metrics.text()
                assert 'tandem_router_tenant_requests_total{outcome="tenant_quota",tenant="alice"} 1.0' in text
                assert "tandem_router_quota_is_alone 0.0" in text


def test_tenants_that_cannot_be_read_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TENANTS_VARIABLE, "sk-secret")
    refused = _run("--port", "0", "--http-port", "0")
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"router: {TENANTS_VARIABLE} is not JSON\n")
