"""What a node's arena holds, as the cluster's directory in a real Redis has it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from kv_transfer import holdings
from kv_transfer.arena_store import ArenaStore
from kv_transfer.holdings import Holdings
from kv_transfer.redis_directory import RedisDirectory
from tandem.domain import BlockHash, Namespace
from tandem.errors import UnavailableError
from tests.dict_store import NAMESPACE, block_hash
from tests.peer_sides import Side
from tests.redis_process import RedisProcess

pytestmark = pytest.mark.integration
pytest_plugins = ("tests.integration.redis_fixtures",)

ADDRESS = "127.0.0.1:5"
OTHER = Namespace("ab" * 16)
HASHES = [block_hash(number) for number in range(5)]


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class CountingDirectory(RedisDirectory):
    """Knows how much it was told."""

    told = 0

    async def announce(self, namespace: Namespace, hashes: Sequence[BlockHash], address: str, ttl_s: float) -> None:
        self.told += len(hashes)
        await super().announce(namespace, hashes, address, ttl_s)

    async def withdraw(self, namespace: Namespace, hashes: Sequence[BlockHash], address: str) -> None:
        self.told += len(hashes)
        await super().withdraw(namespace, hashes, address)

    async def held(self, *numbers: int, namespace: Namespace = NAMESPACE) -> list[set[str]]:
        """Who holds each of these blocks."""
        found = [await self.holders(namespace, [block_hash(number)]) for number in numbers]
        return [set(one) for (one,) in found]


@pytest_asyncio.fixture
async def directory(server: RedisProcess) -> AsyncIterator[CountingDirectory]:
    directory = CountingDirectory(server.url, "c1")
    yield directory
    await directory.close()


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with closing(Side(tmp_path / "store")) as side:
        yield side


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held(side: Side, directory: CountingDirectory, clock: Clock) -> Holdings:
    return Holdings(side.store.arena, directory, ADDRESS, clock)


class TestLooks:
    async def test_what_came_is_announced_once(self, side: Side, directory: CountingDirectory, held: Holdings) -> None:
        side.put(0, 1, 2)
        for _ in range(3):
            await held.look()
        assert await directory.held(0, 1, 2, 3) == [{ADDRESS}] * 3 + [set()]
        assert directory.told == 3

    async def test_what_went_is_withdrawn_once(self, side: Side, directory: CountingDirectory, held: Holdings) -> None:
        side.put(0, 1)
        await held.look()
        side.store.drop(NAMESPACE, HASHES[:1])
        for _ in range(3):
            await held.look()
        assert await directory.held(0, 1) == [set(), {ADDRESS}]
        assert directory.told == 3

    async def test_a_slot_that_was_taken_by_another_block_meanwhile_is_told_as_both(
        self, side: Side, directory: CountingDirectory, held: Holdings
    ) -> None:
        side.put(0)
        await held.look()
        slots = set(side.blocks.committed())
        side.store.drop(NAMESPACE, HASHES[:1])
        numbers = iter(range(1, 1000))
        while slots != set(side.blocks.committed()):  # until its slot is taken
            number = next(numbers)
            side.store.drop(NAMESPACE, [block_hash(number - 1)])
            side.put(number)
        await held.look()
        assert await directory.held(0, number) == [set(), {ADDRESS}]

    async def test_a_block_that_went_and_came_back_is_still_there(self, side: Side, directory: CountingDirectory, held: Holdings) -> None:
        side.put(0)
        await held.look()
        side.store.drop(NAMESPACE, HASHES[:1])
        side.put(0)
        await held.look()
        assert await directory.held(0) == [{ADDRESS}]

    async def test_namespaces_are_kept_apart(self, side: Side, directory: CountingDirectory, held: Holdings) -> None:
        side.put(0)
        await held.look()
        assert await directory.held(0, namespace=OTHER) == [set()]

    async def test_everything_is_told_again_before_it_is_forgotten(
        self, side: Side, directory: CountingDirectory, held: Holdings, clock: Clock, inside: Redis
    ) -> None:
        side.put(0)
        await held.look()
        await inside.flushall()  # a restart that nobody saw
        await held.look()
        assert await directory.held(0) == [set()]
        clock.now_s += holdings._TTL_S / 2
        await held.look()
        assert await directory.held(0) == [{ADDRESS}]
        (key,) = await inside.keys("*")
        assert 0 < await inside.pttl(key) <= 1000 * holdings._TTL_S

    async def test_a_server_that_is_down_is_said_to_be(self, side: Side, held: Holdings, server: RedisProcess) -> None:
        side.put(0)
        server.kill()
        with pytest.raises(UnavailableError):
            await held.look()


class TestRuns:
    @pytest_asyncio.fixture
    async def running(self, held: Holdings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator["asyncio.Task[None]"]:
        monkeypatch.setattr(holdings, "_LOOK_S", 0.01)
        task = asyncio.create_task(held.run())
        yield task
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    @staticmethod
    async def until_held(directory: CountingDirectory, *numbers: int) -> None:
        async with asyncio.timeout(10.0):
            while await directory.held(*numbers) != [{ADDRESS}] * len(numbers):  # noqa: ASYNC110  # a task makes it so
                await asyncio.sleep(0.01)

    async def test_a_server_that_came_back_empty_is_told_everything(
        self,
        side: Side,
        directory: CountingDirectory,
        running: "asyncio.Task[None]",
        server: RedisProcess,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        side.put(0)
        await self.until_held(directory, 0)
        server.kill()
        side.put(1)
        async with asyncio.timeout(10.0):
            while "directory_lost" not in caplog.text:  # noqa: ASYNC110  # a task makes it so
                await asyncio.sleep(0.01)
        await server.start()
        await self.until_held(directory, 0, 1)
        assert caplog.text.count("directory_lost") == 1
        assert not running.done()

    async def test_blocks_that_come_and_go_under_load_are_right_in_the_end(
        self, side: Side, directory: CountingDirectory, running: "asyncio.Task[None]"
    ) -> None:
        for round_number in range(20):
            side.put(*range(50))
            await asyncio.sleep(0.005)
            side.store.drop(NAMESPACE, [block_hash(number) for number in range(round_number % 2, 50, 2)])
            await asyncio.sleep(0.005)
            side.store.drop(NAMESPACE, [block_hash(number) for number in range(50)])
        side.put(*range(10))
        async with asyncio.timeout(10.0):
            while await directory.held(*range(50)) != [{ADDRESS}] * 10 + [set()] * 40:  # noqa: ASYNC110  # a task makes it so
                await asyncio.sleep(0.01)


class TestDirectory:
    async def test_a_block_is_held_by_several(self, directory: CountingDirectory) -> None:
        for address in ("a:1", "b:2", "[::1]:3"):
            await directory.announce(NAMESPACE, HASHES[:1], address, 60.0)
        await directory.withdraw(NAMESPACE, HASHES[:1], "b:2")
        assert await directory.held(0) == [{"a:1", "[::1]:3"}]

    async def test_holders_are_told_up_to_the_first_part_that_ends_in_a_gap(self, directory: CountingDirectory) -> None:
        hashes = [block_hash(number) for number in range(1200)]
        await directory.announce(NAMESPACE, hashes[:700], "a:1", 60.0)
        found = await directory.holders(NAMESPACE, hashes)
        assert found[:700] == [frozenset({"a:1"})] * 700
        assert not any(found[700:])

    async def test_clusters_do_not_see_each_other(self, directory: CountingDirectory, server: RedisProcess) -> None:
        await directory.announce(NAMESPACE, HASHES, "a:1", 60.0)
        other = RedisDirectory(server.url, "c2")
        assert await other.holders(NAMESPACE, HASHES) == [frozenset()] * len(HASHES)
        await other.close()

    async def test_a_hint_expires_by_itself(self, directory: CountingDirectory) -> None:
        await directory.announce(NAMESPACE, HASHES[:1], "a:1", 0.05)
        async with asyncio.timeout(10.0):
            while await directory.held(0) != [set()]:  # noqa: ASYNC110  # the server makes it so
                await asyncio.sleep(0.01)

    async def test_of_no_block_nobody_is_a_holder(self, directory: CountingDirectory) -> None:
        assert await directory.holders(NAMESPACE, []) == []


async def test_a_process_that_only_reads_tells_the_same(side: Side, directory: CountingDirectory) -> None:
    side.put(3)
    with closing(ArenaStore(side.folder, capacity_bytes=1)) as reader:
        await Holdings(reader.arena, directory, ADDRESS).look()
    assert await directory.held(3) == [{ADDRESS}]
