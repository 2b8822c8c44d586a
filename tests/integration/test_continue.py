"""Requests that go on elsewhere, on real engines with real signals: the same tokens, and little computed again."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import tandem
from tandem.demo import DirectCaller, Prompts
from tandem.domain import Receipt, ReplicaState, Role, Sampling
from tests.arena_blocks import ArenaBlocks
from tests.bare_platform import BareOptions, BarePlatform
from tests.seam_cases import JSON_SCHEMA, no_blanks

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

BLOCK_TOKENS = 32
CHUNK_TOKENS = 256
OUTPUT_TOKENS = 400


@dataclass
class Stream:
    """What a client saw of one request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    receipt: Receipt | None = None

    @property
    def largest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False))


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    """Waits until the condition comes true."""
    async with asyncio.timeout(timeout_s):
        for _ in iter(int, 1):
            if await condition():
                return
            await asyncio.sleep(0.02)


class Stage:
    """A platform with two routers, two replicas of each role, and a plain one to compare with."""

    def __init__(self, platform: BarePlatform, client: tandem.AsyncClient) -> None:
        self.platform = platform
        self.client = client
        self.prompts = Prompts()
        self.plain = DirectCaller(platform.replicas["plain"])

    async def run(
        self,
        token_ids: list[int],
        *,
        at: int = 0,
        act: Callable[[], Awaitable[None]] | None = None,
        max_tokens: int = OUTPUT_TOKENS,
        ignore_eos: bool = True,
        **options: Any,
    ) -> Stream:
        """One request; `act` at its token number `at`."""
        seen = Stream()
        async with self.client.stream(token_ids, max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos, **options) as stream:
            async for chunk in stream:
                before = len(seen.token_ids)
                seen.token_ids += chunk.token_ids
                seen.text += chunk.text
                seen.times_s += [time.monotonic()] * bool(chunk.token_ids)
                if act is not None and before < at <= len(seen.token_ids):
                    await act()
            seen.receipt = stream.receipt
        return seen

    async def expected(
        self, token_ids: list[int], max_tokens: int = OUTPUT_TOKENS, *, ignore_eos: bool = True, **options: Any
    ) -> list[int]:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos, **options)
        return list((await self.plain.complete(token_ids, sampling)).token_ids)

    async def busy_decode(self) -> str:
        """The decode replica that runs something, once it is known which."""
        async with asyncio.timeout(5.0):
            while True:
                status = await self.client.status()
                names = [one.lease.replica_id for one in status.replicas if one.lease.role is Role.DECODE and one.load.running_requests]
                if len(names) == 1:
                    return names[0]
                await asyncio.sleep(0.002)

    async def running_on(self, name: str) -> int:
        """Requests that a replica says it runs."""
        status = await self.client.status()
        return next(one.load.running_requests for one in status.replicas if one.lease.replica_id == name)

    async def is_ready(self, name: str) -> bool:
        """Whether it takes work."""
        status = await self.client.status()
        return any(one.lease.replica_id == name and one.is_reachable and one.lease.state is ReplicaState.READY for one in status.replicas)

    def kill(self, name: str) -> None:
        os.kill(self.platform.replicas[name].pid, signal.SIGKILL)

    async def settle(self) -> None:
        """Waits until all replicas are reachable and take work, and nobody has any."""

        async def is_settled() -> bool:
            status = await self.client.status()
            idle = [one for one in status.replicas if one.is_reachable and not one.load.running_requests]
            return sum(one.lease.state is ReplicaState.READY for one in idle) == 4 and not status.running_requests

        await eventually(is_settled)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(zygote_socket: Path | None) -> AsyncIterator[Stage]:
    platform = BarePlatform(BareOptions(prefill=0, decode=2, routers=0, max_restarts=100, zygote_socket=zygote_socket))
    try:
        await platform.start()
        for name in ("prefill-0", "prefill-1"):
            await platform.add_replica(Role.PREFILL, name, max_num_batched_tokens=CHUNK_TOKENS)
        for number in range(2):
            await platform.start_router(f"router-{number}")
        await platform.add_replica(Role.DECODE, "plain", is_kv_transfer_on=False)
        async with tandem.AsyncClient(",".join(platform.router_addresses), timeout_s=120.0) as client:
            stage = Stage(platform, client)
            yield stage
            await stage.plain.close()
    finally:
        await platform.stop()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def settled(stage: Stage) -> AsyncIterator[None]:
    """Whatever became of the test before."""
    await stage.settle()
    yield


@pytest.mark.parametrize("at", [40, 150])
async def test_a_killed_decode_worker_costs_two_blocks_at_most(stage: Stage, at: int) -> None:
    token_ids = stage.prompts.next(1000)

    async def kill() -> None:
        stage.kill(await stage.busy_decode())

    seen = await stage.run(token_ids, at=at, act=kill)
    assert seen.token_ids == await stage.expected(token_ids)
    assert seen.receipt is not None
    assert (seen.receipt.attempts, seen.receipt.one_worker_reason) == (2, "continuation")
    assert seen.receipt.decode_recomputed_tokens <= 2 * BLOCK_TOKENS


async def test_json_by_schema_goes_on_in_the_middle_of_its_object(stage: Stage) -> None:
    token_ids = stage.prompts.next(300)
    options: Any = {"structured_output": JSON_SCHEMA, "logit_bias": no_blanks()}

    async def kill() -> None:
        with contextlib.suppress(TimeoutError):
            stage.kill(await stage.busy_decode())

    for _ in range(3):  # the object is short: where its tokens are read late the kill comes after its end
        seen = await stage.run(token_ids, at=9, act=kill, ignore_eos=False, **options)
        assert seen.receipt is not None
        attempts = seen.receipt.attempts
        if attempts > 1:
            break
        await stage.settle()
    assert attempts == 2
    assert set(json.loads(seen.text)) == {"name", "count", "is_new"}
    assert seen.token_ids == await stage.expected(token_ids, ignore_eos=False, **options)


async def test_a_decode_worker_that_hangs_is_replaced_and_cannot_deliver_when_it_comes_back(stage: Stage) -> None:
    token_ids, pids = stage.prompts.next(1000), []

    async def stop() -> None:
        pids.append(stage.platform.replicas[await stage.busy_decode()].pid)
        os.kill(pids[0], signal.SIGSTOP)

    try:
        seen = await stage.run(token_ids, at=60, act=stop)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whoever looks after it may have ended it
            os.kill(pids[0], signal.SIGCONT)
    assert seen.token_ids == await stage.expected(token_ids)
    assert seen.receipt is not None
    assert seen.receipt.attempts == 2


async def test_a_killed_router_is_replaced_by_the_other_one(stage: Stage) -> None:
    token_ids = stage.prompts.next(1000)
    routers = stage.platform.routers

    async def kill() -> None:
        """The one that serves it: the client connects to the first that answers."""
        routers[0].kill()

    seen = await stage.run(token_ids, at=70, act=kill)
    assert seen.token_ids == await stage.expected(token_ids)
    assert seen.receipt is not None
    assert (seen.receipt.attempts, seen.receipt.router_id) == (2, "router-1")
    assert seen.receipt.decode_recomputed_tokens <= 2 * BLOCK_TOKENS


async def test_a_killed_prefill_worker_costs_the_chunks_that_were_not_published(stage: Stage) -> None:
    token_ids = stage.prompts.next(3000)
    chunks = -(-len(token_ids) // CHUNK_TOKENS)
    blocks = ArenaBlocks(stage.platform.store_dir)
    before, published = len(blocks.committed()), 0
    running = asyncio.create_task(stage.run(token_ids))
    try:
        while not published:
            await asyncio.sleep(0.002)
            status = await stage.client.status()
            busy = [one.lease.replica_id for one in status.replicas if one.lease.role is Role.PREFILL and one.load.running_requests]
            if busy and len(blocks.committed()) - before >= 2 * CHUNK_TOKENS // BLOCK_TOKENS:
                stage.kill(busy[0])
                published = (len(blocks.committed()) - before) * BLOCK_TOKENS // CHUNK_TOKENS
        seen = await running
    finally:
        running.cancel()
        blocks.close()
    assert published < chunks, "the kill came after the last chunk"
    assert seen.token_ids == await stage.expected(token_ids)
    assert seen.receipt is not None
    assert seen.receipt.attempts == 1  # the decode worker saw to it
    assert len(token_ids) - seen.receipt.cached_tokens <= (chunks - published + 1) * CHUNK_TOKENS


async def test_32_streams_of_a_drained_worker_go_on_elsewhere(stage: Stage) -> None:
    prompts = [stage.prompts.next(64) for _ in range(32)]
    expected = await asyncio.gather(*(stage.expected(token_ids, OUTPUT_TOKENS) for token_ids in prompts))
    stage.kill("decode-1")  # so that all of them begin on the other one
    begun, running = asyncio.Event(), 0

    async def note() -> None:
        nonlocal running
        running += 1
        if running == len(prompts):
            begun.set()

    try:
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(stage.run(token_ids, at=10, act=note, max_tokens=OUTPUT_TOKENS)) for token_ids in prompts]
            await begun.wait()
            await eventually(lambda: stage.is_ready("decode-1"))
            on_it = await stage.running_on("decode-0")
            await stage.client.drain("decode-0")
    finally:
        stage.kill("decode-0")  # its next life takes work again
    assert on_it == len(prompts)
    seen = [stream.result() for stream in streams]
    assert [one.token_ids for one in seen] == list(expected)
    assert {one.receipt.decode_replica_id for one in seen if one.receipt is not None} == {"decode-1"}
