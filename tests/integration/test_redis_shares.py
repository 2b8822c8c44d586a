"""The exchange of shares through a real Redis."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tandem.errors import UnavailableError
from tandem.redis_shares import RedisShares
from tests.redis_process import running_redis

pytestmark = pytest.mark.integration


async def test_routers_hear_of_each_other_until_one_is_silent(tmp_path: Path) -> None:
    async with running_redis(tmp_path) as server, AsyncExitStack() as stack:
        one, two = (RedisShares(server.url, "c", name, silence_s=0.3) for name in ("r1 a", "r2 b"))
        for each in (one, two):
            stack.push_async_callback(each.close)
        assert await one.exchange({"served": {"a": 1.5}, "waiting": ["a"]}) == {}
        assert await two.exchange({"served": {}, "waiting": []}) == {"r1 a": {"served": {"a": 1.5}, "waiting": ["a"]}}
        assert await one.exchange({"served": {}, "waiting": []}) == {"r2 b": {"served": {}, "waiting": []}}
        await asyncio.sleep(0.4)
        assert await one.exchange({"served": {}, "waiting": []}) == {}


async def test_a_server_that_is_not_there_is_a_typed_error() -> None:
    shares = RedisShares("redis://127.0.0.1:1", "c", "r", silence_s=1.0)
    with pytest.raises(UnavailableError):
        await shares.exchange({})
    await shares.close()
