"""Fixtures of tests on the register in a real Redis server: `pytest_plugins = ("tests.integration.redis_fixtures",)`."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from redis.asyncio import Redis

from tandem.redis_register import RedisRegister
from tests.redis_process import Open, RedisProcess, running_redis


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    async with running_redis(tmp_path) as process:
        yield process


@pytest_asyncio.fixture
async def open_register(server: RedisProcess) -> AsyncIterator[Open]:
    opened = []

    def open_one(cluster: str = "c1", **settings: float) -> RedisRegister:
        opened.append(RedisRegister(server.url, cluster, **settings))
        return opened[-1]

    yield open_one
    for register in opened:
        await register.close()


@pytest_asyncio.fixture
async def inside(server: RedisProcess) -> AsyncIterator[Redis]:
    """The server, seen without the register."""
    async with Redis.from_url(server.url, decode_responses=True) as redis:
        yield redis
