"""KV blocks from one engine's tensors through the store into another's, and the notices on the way: a real arena, sockets, threads."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kv_transfer.arena_store import ArenaStore, Staged
from kv_transfer.copies import BlockRows
from kv_transfer.kv_tensors import BlockIds, KvTensors
from kv_transfer.link import ConnectorOptions, StoreLink
from kv_transfer.loader import Loader, LoadResult
from kv_transfer.notices import NoticeReceiver, NoticeSender, TransferTotals
from kv_transfer.planner import LoadJob
from kv_transfer.publisher import Publisher
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.config import EngineConfig
from tandem.domain import BlockHash, Namespace
from tandem.engine.base import KvLoaded
from tandem.errors import ConfigError
from tandem.faults import Faults
from tests.arena_blocks import ArenaBlocks
from tests.dict_store import NAMESPACE, block_hash, key
from tests.kv_layers import contiguous, gather, make_layers
from tests.store_benches import as_rows, get, held

pytestmark = pytest.mark.integration

SHAPE = (80, 2, 4, 8)


class Side:
    """One engine's worker half: tensors, publisher and loader, and the replica's link to it."""

    def __init__(self, link: StoreLink, store: ArenaStore, seed: int | None) -> None:
        self.link = link
        self.store = store
        self.layers = make_layers(contiguous, SHAPE, torch.float32, seed)
        self.tensors = KvTensors(self.layers)
        self.totals = TransferTotals()
        self.options = ConnectorOptions(**link.connector()[2])  # type: ignore[arg-type]
        self.notices = NoticeSender(self.options.notice_path)
        self.loader = Loader(self.tensors, store, NAMESPACE, self.notices, self.totals)

    @contextmanager
    def publisher(self, *, granted_blocks: int = 80, faults: str = "") -> Iterator[Publisher]:
        made = Publisher(
            self.tensors,
            self.store,
            NAMESPACE,
            self.notices,
            self.totals,
            granted_blocks=granted_blocks,
            faults=Faults.parse(faults),
        )
        try:
            yield made
        finally:
            made.close()

    def block(self, block_id: int) -> bytes:
        return gather(self.tensors, [block_id])[0]

    def publish(self, blocks: int) -> None:
        """Puts blocks 0, 1, ... under keys 0, 1, ... straight into the store."""
        rows = as_rows(*map(self.block, range(blocks)))
        assert set(self.store.put(NAMESPACE, hashes(blocks), rows)) == {PutOutcome.STORED}

    def job(self, blocks: int, *, is_async: bool = False) -> LoadJob:
        """Keys 0, 1, ... into engine blocks 79, 78, ..."""
        return LoadJob(
            request_id="r-internal",
            tag="r.d1",
            local_tokens=12,
            block_ids=[79 - number for number in range(blocks)],
            hashes=hashes(blocks),
            is_async=is_async,
        )


def hashes(blocks: int) -> list[BlockHash]:
    return [block_hash(number) for number in range(blocks)]


def are_held(store: ArenaStore, blocks: int) -> list[bool]:
    return held(store, [key(number) for number in range(blocks)])


def make_link(tmp_path: Path, name: str) -> StoreLink:
    return StoreLink(EngineConfig(store_dir=str(tmp_path / "store")), NAMESPACE, tmp_path, name)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArenaStore]:
    made = ArenaStore(tmp_path / "store", capacity_bytes=8 << 20)
    yield made
    made.close()


@pytest.fixture
async def make_side(tmp_path: Path, store: ArenaStore) -> AsyncIterator[Callable[..., Side]]:
    sides: list[Side] = []

    def make(seed: int | None = 1, other_store: ArenaStore | None = None) -> Side:
        link = make_link(tmp_path, f"side-{len(sides)}")
        link.listen()
        sides.append(Side(link, other_store or store, seed))
        return sides[-1]

    yield make
    for side in sides:
        side.loader.close()
        side.notices.close()
        side.link.close()
    assert kv_threads() == []


@pytest.fixture
async def side(make_side: Callable[..., Side]) -> Side:
    return make_side()


def kv_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]


async def eventually(is_so: Callable[[], bool]) -> None:
    """Waits until it is so, on the running loop; fails after 10 s."""
    for _ in range(2_000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be so in 10 s")


async def results_of(loader: Loader, loads: int) -> list[LoadResult]:
    """The ends of so many loads; fails after 10 s."""
    results: list[LoadResult] = []
    async with asyncio.timeout(10.0):
        while len(results) < loads:
            results += loader.take_results()
            await asyncio.sleep(0.005)
    return results


class TestPublisher:
    async def test_the_replica_is_told_once_the_last_chunk_is_in_the_store(self, side: Side, store: ArenaStore) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([5, 6], hashes(4)[:2], tag="r.p1", prompt_hashes=None)
            publisher.submit([7, 8], hashes(4)[2:], tag="r.p1", prompt_hashes=hashes(4))
            assert await side.link.published("r.p1", 10.0) == 4
        for number in range(4):
            assert get(store, key(number), side.tensors.block_bytes) == (BlockOutcome.HIT, side.block(5 + number))

    async def test_the_totals_come_with_the_notice(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([5, 6], hashes(2), tag="r.p1", prompt_hashes=hashes(2))
            await side.link.published("r.p1", 10.0)
        totals = side.link.totals()
        assert (totals.published_blocks, totals.published_bytes) == (2, 2 * side.tensors.block_bytes)
        assert totals.unstored_blocks == 0

    async def test_what_the_engine_does_after_submit_does_not_change_the_block(self, side: Side, store: ArenaStore) -> None:
        before = side.block(5)
        with side.publisher(faults="kv_publish.delay_s=0.05") as publisher:
            publisher.submit([5], hashes(1), tag="r.p1", prompt_hashes=None)
            side.layers["model.layers.0.attn"].zero_()
        assert get(store, key(0), side.tensors.block_bytes) == (BlockOutcome.HIT, before)

    async def test_a_prompt_without_a_full_block_is_told_too(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([], [], tag="r.p1", prompt_hashes=[])
            async with asyncio.timeout(10.0):
                assert await side.link.published("r.p1", 60.0) == 0
        assert side.link.totals().unstored_blocks == 0

    async def test_blocks_that_the_store_holds_are_not_stored_again(self, side: Side) -> None:
        side.publish(3)
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([0, 1, 2, 3], hashes(4), tag="r.p1", prompt_hashes=hashes(4))
            assert await side.link.published("r.p1", 10.0) == 4
        assert side.totals.published_blocks == 1

    async def test_what_finds_no_granted_slot_is_counted_and_not_published(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        store = ArenaStore(tmp_path / "small", capacity_bytes=1 << 20)
        side = make_side(other_store=store)
        with side.publisher(granted_blocks=1) as publisher:
            granted = store.prepare(side.tensors.block_bytes, 0)
            assert 0 < granted < 50
            side.link.run_params("r.p1", load=True, publish=True)
            publisher.submit(range(granted + 3), hashes(granted + 3), tag="r.p1", prompt_hashes=hashes(granted + 3))
            assert await side.link.published("r.p1", 10.0) == granted
            assert side.link.totals().unstored_blocks == 3
            await eventually(lambda: store.prepare(side.tensors.block_bytes, 0) > 0)  # slots for the next step
            side.link.run_params("s.p1", load=True, publish=True)
            publisher.submit([granted], [block_hash(granted)], tag="s.p1", prompt_hashes=hashes(granted + 3))
            assert await side.link.published("s.p1", 10.0) == granted + 1
        store.close()

    async def test_slots_are_granted_before_the_first_step(self, side: Side, store: ArenaStore) -> None:
        with side.publisher(granted_blocks=70):
            assert store.prepare(side.tensors.block_bytes, 0) >= 70

    async def test_a_block_goes_on_record_with_its_place_in_its_prompt(self, side: Side, store: ArenaStore, tmp_path: Path) -> None:
        side.publish(1)
        with side.publisher() as publisher:
            publisher.submit([0, 1, 2], hashes(3), tag="r.p1", prompt_hashes=None, first_position=10)
        blocks = ArenaBlocks(tmp_path / "store")
        assert [int(blocks.arena.records["position"][blocks.slot(key(number))]) for number in (1, 2)] == [11, 12]
        blocks.close()

    async def test_new_blocks_take_the_place_of_old_ones_in_a_full_store(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        small = ArenaStore(tmp_path / "small", capacity_bytes=1 << 20)
        side = make_side(other_store=small)
        steps = 3 * (1 << 20) // (40 * side.tensors.block_bytes)
        with side.publisher(granted_blocks=40) as publisher:
            for step in range(steps):
                tag, names = f"{step}.p1", [block_hash(1000 * step + number) for number in range(40)]
                side.link.run_params(tag, load=True, publish=True)
                publisher.submit(range(40), names, tag=tag, prompt_hashes=names)
                assert await side.link.published(tag, 10.0) == 40, step
                await eventually(lambda: small.prepare(side.tensors.block_bytes, 0) >= 40)
        assert side.totals.unstored_blocks == 0
        assert small.stats().used_bytes <= 1 << 20
        small.close()

    async def test_a_store_without_room_is_counted_and_keeps_nobody_waiting(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        full, other = (ArenaStore(tmp_path / "full", capacity_bytes=1 << 20) for _ in range(2))
        side = make_side(other_store=full)
        other.prepare(side.tensors.block_bytes, 1 << 20)
        with side.publisher() as publisher:
            side.link.run_params("r.p1", load=True, publish=True)
            publisher.submit([0, 1, 2], hashes(3), tag="r.p1", prompt_hashes=hashes(3))
            assert await side.link.published("r.p1", 10.0) == 0
            assert side.link.totals().unstored_blocks == 3
        for store in (full, other):
            store.close()

    async def test_a_broken_store_does_not_keep_the_replica_waiting(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        class Broken(ArenaStore):
            def commit(self, staged: Staged) -> list[PutOutcome]:
                raise OSError("broken")

        broken = Broken(tmp_path / "broken", capacity_bytes=1 << 20)
        side = make_side(other_store=broken)
        with side.publisher(granted_blocks=2) as publisher:
            for tag in ("r.p1", "s.p1"):
                side.link.run_params(tag, load=True, publish=True)
                publisher.submit([0], hashes(1), tag=tag, prompt_hashes=hashes(1))
                async with asyncio.timeout(10.0):
                    assert await side.link.published(tag, 60.0) == 0
        assert side.totals.unstored_blocks == 0
        broken.close()

    async def test_the_delay_fault_holds_back_blocks_and_notice(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(faults="kv_publish.delay_s=0.2") as publisher:
            started_s = time.monotonic()
            publisher.submit([0], hashes(1), tag="r.p1", prompt_hashes=hashes(1))
            assert await side.link.published("r.p1", 0.01) == 0
            assert await side.link.published("r.p1", 10.0) == 1
            assert time.monotonic() - started_s >= 0.2

    async def test_the_drop_fault_loses_every_nth_block(self, side: Side, store: ArenaStore) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(faults="kv_put.drop_every=2") as publisher:
            publisher.submit([0, 1, 2, 3], hashes(4), tag="r.p1", prompt_hashes=hashes(4))
            assert await side.link.published("r.p1", 10.0) == 1
        assert are_held(store, 4) == [True, False, True, False]

    async def test_close_ends_the_thread_after_the_jobs_that_are_there(self, side: Side, store: ArenaStore) -> None:
        with side.publisher(faults="kv_publish.delay_s=0.02") as publisher:
            for number in range(3):
                publisher.submit([number], [block_hash(number)], tag="r.p1", prompt_hashes=None)
            assert kv_threads() == ["kv-publisher"]
        assert kv_threads() == []
        assert are_held(store, 3) == [True] * 3
        publisher.close()

    async def test_a_replica_that_is_gone_does_not_break_the_publisher(self, side: Side, store: ArenaStore) -> None:
        side.link.close()
        with side.publisher() as publisher:
            for number in range(2):
                publisher.submit([number], [block_hash(number)], tag="r.p1", prompt_hashes=[block_hash(number)])
        assert are_held(store, 2) == [True, True]


class TestLoader:
    async def test_blocks_of_one_engine_are_loaded_into_another(self, make_side: Callable[..., Side]) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(70)  # more than a batch
        target.link.run_params("r.d1", load=True, publish=True)
        assert target.loader.load(target.job(70)) == LoadResult(request_id="r-internal", invalid_block_ids=[])
        assert all(target.block(79 - number) == source.block(number) for number in range(70))
        assert not any(target.block(0))
        payload_bytes = 70 * source.tensors.block_bytes
        await eventually(lambda: target.link.totals().loaded_blocks == 70)
        assert target.link.totals().loaded_bytes == payload_bytes
        assert target.link.take_loaded("r.d1") == KvLoaded(local_tokens=12, blocks=70, payload_bytes=payload_bytes)
        assert target.link.take_loaded("r.d1") is None

    @pytest.mark.parametrize("bad", [0, 2, 66])
    async def test_a_corrupt_block_invalidates_all_from_there_on(self, make_side: Callable[..., Side], store: ArenaStore, bad: int) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(70)
        blocks = ArenaBlocks(Path(source.options.store_dir))
        blocks.flip(key(bad), target.tensors.block_bytes - 1)
        blocks.close()
        result = target.loader.load(target.job(70))
        assert result.invalid_block_ids == [79 - number for number in range(bad, 70)]
        assert all(target.block(79 - number) == source.block(number) for number in range(bad))
        # The corrupt one may be there in part: the engine computes it. Nothing after it was touched.
        assert not any(any(target.block(79 - number)) for number in range(bad + 1, 70))
        assert (target.totals.corrupt_blocks, target.totals.missing_blocks, target.totals.loaded_blocks) == (1, 0, bad)
        assert held(store, [key(bad)]) == [False]
        await eventually(lambda: target.link.totals().corrupt_blocks == 1)

    async def test_a_missing_block_invalidates_all_from_there_on(self, make_side: Callable[..., Side], store: ArenaStore) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(4)
        store.drop(NAMESPACE, [block_hash(1)])
        assert target.loader.load(target.job(4)).invalid_block_ids == [78, 77, 76]
        assert (target.totals.corrupt_blocks, target.totals.missing_blocks, target.totals.loaded_blocks) == (0, 1, 1)

    async def test_a_load_outside_the_step_ends_exactly_once(self, make_side: Callable[..., Side]) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(3)
        target.loader.load_later(target.job(3, is_async=True))
        target.loader.load_later(target.job(4, is_async=True))
        results = await results_of(target.loader, 2)
        assert [result.invalid_block_ids for result in results] == [[], [76]]
        assert target.block(79) == source.block(0)
        assert target.loader.take_results() == []

    async def test_a_broken_store_ends_a_load_outside_the_step_too(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        class Broken(ArenaStore):
            def load(
                self,
                namespace: Namespace,
                hashes: Sequence[BlockHash],
                rows: BlockRows,
                block_ids: BlockIds,
                *,
                only_leading: bool = False,
            ) -> list[BlockOutcome]:
                raise OSError("broken")

        broken = Broken(tmp_path / "broken", capacity_bytes=1 << 20)
        target = make_side(other_store=broken)
        for _ in range(2):
            target.loader.load_later(target.job(2, is_async=True))
        results = await results_of(target.loader, 2)
        assert [result.invalid_block_ids for result in results] == [[79, 78]] * 2
        broken.close()

    async def test_close_ends_the_thread_after_the_jobs_that_are_there(self, make_side: Callable[..., Side]) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(3)
        target.loader.load_later(target.job(3, is_async=True))
        assert kv_threads() == ["kv-loader"]
        target.loader.close()
        assert kv_threads() == []
        assert len(target.loader.take_results()) == 1

    async def test_a_loader_that_was_never_used_has_no_thread_to_end(self, side: Side) -> None:
        side.loader.close()
        assert side.loader.take_results() == []


class TestStoreLink:
    async def test_the_connector_gets_its_settings_as_plain_values(self, tmp_path: Path) -> None:
        link = make_link(tmp_path, "one")
        name, module, settings = link.connector()
        assert (name, module) == ("TandemConnector", "kv_transfer.connector")
        assert asdict(ConnectorOptions(**settings)) == settings  # type: ignore[arg-type]
        assert all(isinstance(value, str | int) for value in settings.values())
        link.close()

    async def test_published_is_zero_where_no_notice_comes(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        assert await side.link.published("r.p1", 0.0) == 0
        assert await side.link.published("r.p1", 0.01) == 0

    async def test_a_notice_that_came_first_is_kept(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([0], hashes(1), tag="r.p1", prompt_hashes=hashes(1))
        await eventually(lambda: side.link.totals().published_blocks == 1)
        assert await side.link.published("r.p1", 1.0) == 1

    async def test_nothing_is_kept_of_a_forgotten_run(self, side: Side) -> None:
        side.publish(1)
        for _ in range(2):
            side.link.run_params("r.d1", load=True, publish=True)
            side.link.forget("r.d1")
        side.link.forget("never seen")
        side.loader.load(side.job(1))
        await eventually(lambda: side.link.totals().loaded_blocks == 1)
        assert side.link.take_loaded("r.d1") is None

    async def test_close_removes_the_socket_and_may_be_repeated(self, tmp_path: Path) -> None:
        link = make_link(tmp_path, "one")
        link.listen()
        assert (tmp_path / "one.sock").is_socket()
        link.close()
        link.close()
        assert not (tmp_path / "one.sock").exists()

    async def test_a_replica_that_was_killed_can_start_again(self, tmp_path: Path) -> None:
        killed = NoticeReceiver(tmp_path / "one.sock")
        killed._socket.close()  # as the kernel does: the file stays
        link = make_link(tmp_path, "one")
        link.close()

    async def test_a_socket_path_that_is_too_long_is_told_so(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot listen on the Unix socket .* its path short"):
            make_link(tmp_path, "x" * 100)
