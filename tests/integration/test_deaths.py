"""Processes killed and stopped with real signals: streams go on with the same tokens, nothing is orphaned."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import pytest_asyncio

import tandem
from tandem.demo import DirectCaller, Prompts
from tandem.domain import Role
from tests.bare_platform import BareOptions, BarePlatform

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

OUTPUT_TOKENS = 1000  # some seconds: a busy machine reads them late, and they must not all be there when a worker is killed


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform() -> AsyncIterator[BarePlatform]:
    platform = BarePlatform(BareOptions(max_restarts=100))
    try:
        await platform.start()
        await platform.add_replica(Role.DECODE, "plain", is_kv_transfer_on=False)
        yield platform
    finally:
        await platform.stop()


async def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition comes true in time."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        if condition():
            return True
        await asyncio.sleep(0.02)
    return condition()


async def wait_serving(platform: BarePlatform, name: str, old_pid: int) -> None:
    """Waits for the replica's next start."""
    assert await eventually(lambda: platform.replicas[name].pid not in (0, old_pid) and bool(platform.replicas[name].address), 30.0)
    async with tandem.AsyncClient(platform.router_address) as client:
        for _ in range(200):
            status = await client.status()
            if {replica.lease.replica_id for replica in status.replicas if replica.is_reachable} >= {"prefill-0", "decode-0"}:
                return
            await asyncio.sleep(0.05)
    raise AssertionError("the router does not see the replica again")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["front", "core"])
async def test_a_decode_worker_lost_mid_stream_costs_a_pause_and_no_token(
    platform: BarePlatform, victim: str, number: signal.Signals
) -> None:
    prompts, plain = Prompts(), DirectCaller(platform.replicas["plain"])
    token_ids = prompts.next(600)
    expected = await plain.run(token_ids, OUTPUT_TOKENS)
    replica = platform.replicas["decode-0"]
    core = psutil.Process(replica.pid).children()[0].pid
    received: list[int] = []
    is_lost = False
    async with (
        tandem.AsyncClient(platform.router_address, timeout_s=60.0) as client,
        client.stream(token_ids, max_tokens=OUTPUT_TOKENS, temperature=0.0) as stream,
    ):
        async for chunk in stream:
            received += chunk.token_ids
            if not is_lost and len(received) >= 40:
                is_lost = True
                os.kill(replica.pid if victim == "front" else core, number)
        receipt = stream.receipt
    assert received == expected.token_ids
    assert receipt is not None
    assert receipt.attempts == 2
    assert await eventually(lambda: not psutil.pid_exists(core) and not psutil.pid_exists(replica.pid), 5.0)
    await wait_serving(platform, "decode-0", replica.pid)
    await plain.close()


async def test_a_prefill_worker_killed_before_its_token_is_replaced(platform: BarePlatform) -> None:
    prompts, plain = Prompts(), DirectCaller(platform.replicas["plain"])
    token_ids = prompts.next(1400)
    expected = await plain.run(token_ids, 24)
    replica = platform.replicas["prefill-0"]
    async with tandem.AsyncClient(platform.router_address, timeout_s=60.0) as client:
        request = asyncio.create_task(client.generate(token_ids, max_tokens=24, temperature=0.0))
        await asyncio.sleep(0.03)
        os.kill(replica.pid, signal.SIGKILL)
        completion = await request
    assert list(completion.token_ids) == expected.token_ids
    await wait_serving(platform, "prefill-0", replica.pid)
    await plain.close()


async def test_the_death_of_the_zygote_takes_no_replica_along(platform: BarePlatform) -> None:
    assert platform.zygote is not None
    os.kill(platform.zygote.pid, signal.SIGKILL)
    async with tandem.AsyncClient(platform.router_address, timeout_s=60.0) as client:
        completion = await client.generate(Prompts().next(300), max_tokens=8, temperature=0.0)
    assert len(completion.token_ids) == 8
    assert all(psutil.pid_exists(replica.pid) for replica in platform.replicas.values())
    await platform.start_zygote()


async def test_an_engine_without_kv_transfer_dies_with_its_replica_too(platform: BarePlatform) -> None:
    replica = platform.replicas["plain"]
    core = psutil.Process(replica.pid).children()[0]
    os.kill(replica.pid, signal.SIGKILL)
    assert await eventually(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE, 5.0)
    assert await eventually(
        lambda: platform.replicas["plain"].pid not in (0, replica.pid) and bool(platform.replicas["plain"].address), 30.0
    )
