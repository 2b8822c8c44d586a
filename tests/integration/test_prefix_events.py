"""What a real engine stores and removes, as the prefix index of a router has it: one replica, routers that come and go."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from kv_transfer.blocks import block_hashes
from router.config import RouterConfig
from router.core import RouterCore
from router.shell import RouterShell
from router.workers import Workers
from tandem.config import MIB
from tandem.demo import DirectCaller, Prompts
from tandem.domain import Role
from tandem.launch import ReplicaProcess
from tandem.polling import poll_until
from tandem.telemetry import RouterMetrics
from tests.bare_platform import BareOptions, BarePlatform

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

WAIT_S = 20.0
BLOCK_TOKENS = 32
PROMPT_TOKENS = 640
FILLING_TOKENS = 1900


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(zygote_socket: Path | None) -> AsyncIterator[ReplicaProcess]:
    """Without a store, so that what it has cached is the engine's own."""
    platform = BarePlatform(BareOptions(prefill=0, decode=0, routers=0, kv_cache_bytes=16 * MIB, zygote_socket=zygote_socket))
    try:
        await platform.start()
        yield await platform.add_replica(Role.DECODE, "only", is_kv_transfer_on=False)
    finally:
        await platform.stop()


@asynccontextmanager
async def router_of(replica: ReplicaProcess) -> AsyncIterator[RouterCore]:
    """A router that has just started."""
    core = RouterCore(RouterConfig(), Random(1))
    workers = Workers([replica.address], RouterShell(RouterConfig(), core, RouterMetrics(CollectorRegistry())), Random(2))
    watching = asyncio.create_task(workers.watch_forever())
    yield core
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


def believed(core: RouterCore, tokens: Sequence[int]) -> int:
    """Leading blocks of a prompt that the only replica is believed to have."""
    return max(core.prefixes.match(block_hashes(tokens, BLOCK_TOKENS)).values(), default=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        await poll_until(condition, 0.02)


async def cached_tokens(caller: DirectCaller, tokens: Sequence[int]) -> int:
    """What the engine itself says of a prompt."""
    receipt = (await caller.run(tokens, 2)).receipt
    assert receipt is not None
    return receipt.cached_tokens


async def test_what_the_engine_stores_and_removes_is_known_and_a_new_router_knows_it_too(replica: ReplicaProcess) -> None:
    caller, prompts = DirectCaller(replica), Prompts()
    prompt = prompts.next(PROMPT_TOKENS)
    longer = [*prompt, *prompts.next(BLOCK_TOKENS + 5)]
    blocks = PROMPT_TOKENS // BLOCK_TOKENS
    async with router_of(replica) as core:
        await until(lambda: bool(core.fleet.leases))
        assert believed(core, prompt) == 0
        assert await cached_tokens(caller, prompt) == 0
        await until(lambda: believed(core, prompt) == blocks)
        assert believed(core, longer) == blocks
        assert await cached_tokens(caller, longer) == blocks * BLOCK_TOKENS
        await until(lambda: believed(core, longer) == blocks + 1)
    async with router_of(replica) as restarted:
        await until(lambda: believed(restarted, longer) == blocks + 1)
        # Other prompts push it out, its end first: belief follows, and agrees with what the engine finds.
        for _ in range(30):
            await caller.run(prompts.next(FILLING_TOKENS), 1)
            if believed(restarted, longer) < blocks + 1:
                break
        await asyncio.sleep(1.5)  # all of it was told
        left = believed(restarted, longer)
        assert left < blocks + 1
        assert await cached_tokens(caller, longer) == left * BLOCK_TOKENS
    await caller.close()
