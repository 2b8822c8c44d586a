"""One platform on real vLLM for all tests that need one: 1 + 1 replicas, a router, and a plain replica without connector."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest_asyncio

import tandem
from tandem.demo import DirectCaller, Prompts
from tandem.domain import Role
from tests.bare_platform import BareOptions, BarePlatform


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What tests use of the platform."""

    platform: BarePlatform
    client: tandem.AsyncClient
    plain: DirectCaller
    prompts: Prompts


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    platform = BarePlatform(BareOptions())
    try:
        await platform.start()
        plain = DirectCaller(await platform.add_replica(Role.DECODE, "plain", is_kv_transfer_on=False))
        async with tandem.AsyncClient(platform.router_address, timeout_s=60.0) as client:
            yield Cluster(platform=platform, client=client, plain=plain, prompts=Prompts())
        await plain.close()
    finally:
        await platform.stop()
