"""Quotas in a real Redis: what several routers admit together, and what they do without it."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from router.quota import Quotas
from router.quota_leases import QuotaLeases
from tandem.errors import OverloadedError, UnavailableError
from tandem.redis_quota import RedisQuota
from tandem.telemetry import RouterMetrics
from tandem.tenancy import SliceAsk, Tenant, TokenKind
from tests.redis_process import RedisProcess, running_redis

pytestmark = pytest.mark.integration

LIMIT_PER_MINUTE = 60_000
LIMIT_PER_S = LIMIT_PER_MINUTE / 60
BURST_S = 1.0
TENANT = Tenant(name="alice", key_sha256=("0" * 64,), prompt_tokens_per_minute=LIMIT_PER_MINUTE)


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    async with running_redis(tmp_path) as process:
        yield process


class Router:
    """The quota part of one router, with a client that sends requests of `request_tokens` as fast as it was told to."""

    def __init__(self, url: str, seed: int, routers: int = 2) -> None:
        self.registry = CollectorRegistry()
        self.quotas = Quotas([TENANT])
        self.store = RedisQuota(url, "c", timeout_s=0.3, burst_s=BURST_S)
        self.leases = QuotaLeases(self.quotas, self.store, RouterMetrics(self.registry), lambda: routers, Random(seed))
        self.admitted = 0
        self.refused = 0

    async def overload(self, *, tokens_per_s: float, request_tokens: int, seconds: float) -> None:
        """Sends until the time is over, whatever is answered."""
        start_s, sent = time.monotonic(), 0
        while (passed_s := time.monotonic() - start_s) < seconds:
            while sent < passed_s * tokens_per_s:
                sent += request_tokens
                try:
                    self.quotas.check("alice")
                except OverloadedError:
                    self.refused += 1
                else:
                    self.quotas.begin("alice", request_tokens)
                    self.quotas.end("alice")
                    self.admitted += request_tokens
            await asyncio.sleep(0.01)

    @property
    def is_alone(self) -> bool:
        return self.registry.get_sample_value("tandem_router_quota_is_alone") == 1.0


def ask(tokens: int, tenant: str = "alice", tokens_per_s: float = 100.0) -> SliceAsk:
    return SliceAsk(tenant=tenant, kind=TokenKind.PROMPT, tokens=tokens, tokens_per_s=tokens_per_s)


@pytest.mark.parametrize("shares", [(1.5, 1.5), (3.0, 0.0)], ids=["even", "one router only"])
async def test_two_routers_together_admit_the_limit_under_three_times_its_load(server: RedisProcess, shares: tuple[float, float]) -> None:
    seconds, request_tokens = 10.0, 100
    routers = [Router(server.url, seed) for seed in (1, 2)]
    tasks = [asyncio.create_task(router.leases.run()) for router in routers]
    start_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for router, share in zip(routers, shares, strict=True):
            if share:
                group.create_task(
                    router.overload(tokens_per_s=share * LIMIT_PER_S, request_tokens=request_tokens, seconds=seconds), name="load"
                )
    passed_s = time.monotonic() - start_s
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for router in routers:
        await router.store.close()
    admitted = sum(router.admitted for router in routers)
    print(f"admitted {admitted / (LIMIT_PER_S * passed_s):.3f} of the limit, {[router.admitted for router in routers]} tokens")
    assert admitted <= 1.02 * LIMIT_PER_S * passed_s + BURST_S * LIMIT_PER_S
    assert admitted >= 0.95 * LIMIT_PER_S * passed_s
    assert sum(router.refused for router in routers) > 100
    assert not any(router.is_alone for router in routers)
    if all(shares):
        assert min(router.admitted for router in routers) > 0.25 * admitted


async def test_a_lease_takes_what_is_there_and_what_is_given_back_can_be_taken(server: RedisProcess) -> None:
    quota = RedisQuota(server.url, "c", burst_s=10.0)
    assert await quota.lease([ask(60), ask(50, "bob")], 1) == [60, 50]
    assert await quota.lease([ask(-800)], 1) == [-800]
    assert 840 <= (await quota.lease([ask(10_000)], 1))[0] < 940  # 40 + 800, and what has come since
    assert (await quota.lease([ask(10_000)], 1))[0] < 100
    await quota.close()


async def test_of_a_bucket_that_runs_dry_a_router_takes_its_part_only(server: RedisProcess) -> None:
    quota = RedisQuota(server.url, "c", burst_s=1000.0)
    assert await quota.lease([ask(-99_900), ask(90_000)], 4) == [-99_900, 90_000]
    (given,) = await quota.lease([ask(90_000)], 4)
    assert 2500 <= given < 2600
    await quota.close()


async def test_a_new_bucket_holds_one_second_and_fills_up_while_nobody_takes_anything(server: RedisProcess) -> None:
    quota = RedisQuota(server.url, "c", burst_s=2.0)
    assert await quota.lease([ask(1_000_000, tokens_per_s=1000.0)], 1) == [1000]
    await asyncio.sleep(2.5)
    assert await quota.lease([ask(1_000_000, tokens_per_s=1000.0)], 1) == [2000]
    await quota.close()


async def test_nothing_given_back_is_more_than_the_burst_and_full_buckets_expire_an_hour_later(server: RedisProcess) -> None:
    quota = RedisQuota(server.url, "c", burst_s=1.0)
    await quota.lease([ask(-1_000_000)], 1)
    assert (await quota.lease([ask(1_000_000)], 1))[0] == 100
    async with Redis.from_url(server.url, decode_responses=True) as inside:
        assert await inside.keys() == ["tandem:c:quota:alice:prompt"]
        assert 3_600_000 < await inside.pttl("tandem:c:quota:alice:prompt") <= 3_601_000
    await quota.close()


async def test_clusters_share_nothing(server: RedisProcess) -> None:
    one, other = RedisQuota(server.url, "c"), RedisQuota(server.url, "d")
    assert await one.lease([ask(100)], 1) == [100]
    assert await other.lease([ask(100)], 1) == [100]
    for quota in (one, other):
        await quota.close()


async def test_without_redis_a_router_goes_on_with_its_part_and_says_so(server: RedisProcess) -> None:
    router = Router(server.url, 1, routers=2)
    task = asyncio.create_task(router.leases.run())
    server.kill()
    seconds, request_tokens = 4.0, 50
    await router.overload(tokens_per_s=3 * LIMIT_PER_S, request_tokens=request_tokens, seconds=seconds)
    print(f"alone: admitted {router.admitted / (LIMIT_PER_S * seconds):.3f} of the limit, the part is 0.5")
    assert router.is_alone
    assert 0.4 * LIMIT_PER_S * seconds <= router.admitted <= 0.51 * LIMIT_PER_S * seconds + LIMIT_PER_S
    with pytest.raises(UnavailableError):
        await router.store.lease([], 1)
    await server.start()
    async with asyncio.timeout(10):
        while router.is_alone:  # noqa: ASYNC110  # the state belongs to the code under test, which has no event for it
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await router.store.close()
