"""A real Prometheus, with the configuration of deploy/, scrapes a live platform; every panel of the dashboard then has data."""

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
import pytest_asyncio

import tandem
from tandem.cleanup import MEMBER_OF
from tandem.cluster_config import ClusterConfig, ModelConfig
from tandem.config import MIB
from tandem.launch import stop_process
from tandem.up import Platform
from tests.dashboard import Query, queries
from tests.layers import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"
FETCHED = ROOT / "build" / "prometheus" / "usr" / "bin"
COMPONENTS = {"router", "autoscaler", "replica", "store"}
LONG_PROMPT = "The for statement is used to iterate over the elements of a sequence. " * 12
ROUNDS = 4
WAIT_S = 60.0
POLL_S = 0.2
SCRAPE_S = 1.0


def program(name: str) -> str:
    found = shutil.which(name) or (str(FETCHED / name) if (FETCHED / name).is_file() else None)
    if found is None:
        pytest.fail(f"there is no {name}: `make prometheus` fetches it, or install Debian's package prometheus")
    return found


class Prometheus:
    """A running Prometheus, asked over HTTP."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        async with self._session.get(f"{self._url}/api/v1/{path}?{urlencode(parameters)}") as answer:
            body = await answer.json()
            assert body["status"] == "success", f"{parameters}: {body.get('error')}"
            return body["data"]

    async def values(self, query: str) -> dict[str, float]:
        """What an instant query answers: a value for each set of labels."""
        data = await self.get("query", query=query)
        return {json.dumps(item["metric"], sort_keys=True): float(item["value"][1]) for item in data["result"]}

    async def up(self) -> dict[str, str]:
        """Health of each target, by address."""
        return {target["labels"]["instance"]: target["health"] for target in (await self.get("targets", state="active"))["activeTargets"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A platform that has served, and the Prometheus that saw it."""

    cluster: str
    http: str
    prometheus: Prometheus
    session: aiohttp.ClientSession
    output_tokens: int


@pytest.fixture(scope="module")
def own_user() -> Iterator[None]:
    """Other clusters of this user are not seen, and their clients do not see this one. Short: sockets of Ray are in it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="t") as folder:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(MEMBER_OF, "")  # the platform sets it; here it is put back
        for name in ("REDIS_URL", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(own_user: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    model = ModelConfig(kv_cache_bytes=64 * MIB)
    disk = str(tmp_path_factory.mktemp("disk"))
    started = Platform(
        ClusterConfig(port=0, http_port=0, store_capacity_bytes=128 * MIB, models=(model,), kv_disk=disk, kv_redis_bytes=32 * MIB)
    )
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    """Requests go through the SDK and HTTP while Prometheus scrapes, so that counters are seen to grow."""
    folder = tmp_path_factory.mktemp("prometheus")
    http = platform.http_addresses[0]
    text = CONFIGURATION.read_text().replace("127.0.0.1:8480", http).replace("5s", f"{SCRAPE_S:.0f}s")
    (folder / "prometheus.yml").write_text(text)
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "GOMAXPROCS": "1"},
        )
    try:
        async with (
            aiohttp.ClientSession() as session,
            tandem.AsyncClient(platform.router_addresses[0], timeout_s=60.0) as client,
        ):
            prometheus = Prometheus(f"http://127.0.0.1:{port}", session)
            await until_all_up(prometheus, folder / "log")
            output_tokens = 0
            for number in range(ROUNDS):
                completion = await client.generate(f"{number} {LONG_PROMPT}", max_tokens=8)
                async with session.post(f"http://{http}/v1/completions", json={"prompt": "Sets are", "max_tokens": 4}) as answer:
                    body = await answer.json()
                assert completion.usage is not None
                output_tokens += completion.usage.output_tokens + body["usage"]["completion_tokens"]
                await until_counted(prometheus, 2 * (number + 1))  # a scrape between two rounds
            yield Watched(cluster=platform.cluster, http=http, prometheus=prometheus, session=session, output_tokens=output_tokens)
    finally:
        await stop_process(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def until_all_up(prometheus: Prometheus, log: Path) -> None:
    """Returns when one process of each kind at least is there, and every process answers."""
    health: dict[str, str] = {}
    try:
        async with asyncio.timeout(WAIT_S):
            while len(health) < len(COMPONENTS) or set(health.values()) != {"up"}:
                await asyncio.sleep(POLL_S)
                with suppress(aiohttp.ClientError):  # not listening yet
                    health = await prometheus.up()
    except TimeoutError:
        pytest.fail(f"not all targets are up: {health}\n{(await asyncio.to_thread(log.read_text))[-3000:]}")


async def until_counted(prometheus: Prometheus, requests: int) -> None:
    """Returns when Prometheus has seen that many requests end, and a scrape later: every process was scraped since."""
    async with asyncio.timeout(WAIT_S):
        seen = 0.0
        while seen < requests:
            await asyncio.sleep(POLL_S)
            seen = sum((await prometheus.values("tandem_router_requests_total")).values())
    await asyncio.sleep(SCRAPE_S)


async def test_promtool_takes_the_configuration() -> None:
    command = [program("promtool"), "check", "config", str(CONFIGURATION)]
    result = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


async def test_every_target_of_the_router_is_scraped_and_up(watched: Watched) -> None:
    async with watched.session.get(f"http://{watched.http}/sd") as answer:
        groups = await answer.json()
    assert {group["labels"]["component"] for group in groups} == COMPONENTS
    found = (await watched.prometheus.get("targets", state="active"))["activeTargets"]
    assert {target["discoveredLabels"]["__address__"] for target in found} == {target for group in groups for target in group["targets"]}
    assert {target["labels"]["instance"]: target["health"] for target in found if target["health"] != "up"} == {}


async def test_a_process_is_called_by_its_name_and_not_by_its_port(watched: Watched) -> None:
    names = await watched.prometheus.up()
    assert {"router-0", "autoscaler-0", "bundled-prefill-0", "bundled-decode-0"} <= names.keys()


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
async def test_a_panel_has_data(watched: Watched, query: Query) -> None:
    variables = {"cluster": watched.cluster, "model": ".*", "__rate_interval": "1m", "__range": "5m"}
    values = await watched.prometheus.values(query.fill(variables))
    assert values, query.text
    assert {labels: value for labels, value in values.items() if not math.isfinite(value)} == {}


async def test_what_was_served_is_seen(watched: Watched) -> None:
    async def one(query: str) -> float:
        (value,) = (await watched.prometheus.values(query)).values()
        return value

    assert await one('sum(tandem_router_requests_total{outcome="ok"})') == 2 * ROUNDS
    assert await one("sum(tandem_router_output_tokens_total)") == watched.output_tokens
    assert await one("sum(tandem_kv_published_bytes_total)") > 0
    assert await one("sum(tandem_kv_loaded_bytes_total)") > 0
    assert await one("sum(tandem_store_blocks)") > 0
    assert await one("sum(tandem_autoscaler_is_leader)") == 1


async def test_series_of_the_engine_keep_the_names_that_vllm_gave_them(watched: Watched) -> None:
    names = await watched.prometheus.get("label/__name__/values")
    assert "vllm:num_requests_running" in names
    assert [name for name in names if name.startswith("vllm_")] == []


async def test_no_series_tells_when_a_counter_was_made(watched: Watched) -> None:
    names = await watched.prometheus.get("label/__name__/values")
    assert [name for name in names if name.endswith("_created")] == []
