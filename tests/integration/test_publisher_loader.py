"""KV blocks from one engine's tensors through the store into another's, and the notices on the way: real files, sockets and threads."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_transfer.blocks import BlockKey
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.link import ConnectorOptions, StoreLink
from kv_transfer.loader import Loader, LoadResult
from kv_transfer.notices import NoticeReceiver, NoticeSender, TransferTotals
from kv_transfer.planner import LoadJob
from kv_transfer.publisher import Publisher
from kv_transfer.shm_store import ShmStore
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome
from tandem.config import EngineConfig
from tandem.engine.base import KvLoaded
from tandem.errors import ConfigError
from tandem.faults import Faults
from tests.dict_store import NAMESPACE, DictStore, key

pytestmark = pytest.mark.integration

LAYERS = 3


def contiguous(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return [torch.zeros(blocks, heads, tokens, channels, dtype=torch.float64) for _ in range(LAYERS)]


def tokens_before_heads(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return [torch.zeros(blocks, tokens, heads, channels, dtype=torch.float64).permute(0, 2, 1, 3) for _ in range(LAYERS)]


def one_storage(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return list(torch.zeros(LAYERS, blocks, heads, tokens, channels, dtype=torch.float64))


def blocks_outermost(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return list(torch.zeros(blocks, LAYERS, heads, tokens, channels, dtype=torch.float64).transpose(0, 1))


Layout = Callable[[int, int, int, int], list[torch.Tensor]]
LAYOUTS = (contiguous, tokens_before_heads, one_storage, blocks_outermost)
SHAPES = ((5, 2, 4, 8), (4, 1, 1, 2), (3, 4, 32, 6))


def make_layers(layout: Layout, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int | None) -> dict[str, torch.Tensor]:
    """Named layers in this memory layout, zero or random."""
    layers = {}
    for number, made in enumerate(layout(*shape)):
        layer = made.to(dtype)  # keeps the strides
        assert layer.stride() == made.stride() or dtype is not torch.float64
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + number)
            layer.copy_(torch.randint(0, 200, shape, generator=generator).to(dtype))
        layers[f"model.layers.{number}.attn"] = layer
    return layers


class TestKvTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks_come_back_from_their_rows(self, layout: Layout, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        source, target = make_layers(layout, shape, dtype, 1), make_layers(layout, shape, dtype, None)
        ours, theirs = KvTensors(source), KvTensors(target)
        assert ours.num_blocks == shape[0]
        assert ours.block_bytes == LAYERS * math.prod(shape[1:]) * dtype.itemsize
        rows = [np.zeros(ours.block_bytes, dtype=np.uint8) for _ in range(2)]
        ours.gather([2, 0], rows)
        theirs.scatter([1, 2], rows)
        for name, layer in source.items():
            assert torch.equal(target[name][1], layer[2])
            assert torch.equal(target[name][2], layer[0])
            assert not target[name][0].any()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_row_is_in_logical_order_whatever_the_layout(self, layout: Layout) -> None:
        layers = make_layers(layout, (3, 2, 4, 8), torch.float32, 1)
        tensors = KvTensors(layers)
        row = np.zeros(tensors.block_bytes, dtype=np.uint8)
        tensors.gather([1], [row])
        assert row.tobytes() == b"".join(layer[1].contiguous().numpy().tobytes() for layer in layers.values())

    def test_layers_are_in_the_order_of_their_numbers(self) -> None:
        layers = {f"model.layers.{number}.attn": torch.full((1, 1, 1, 1), number, dtype=torch.uint8) for number in (10, 9, 2)}
        row = np.zeros(3, dtype=np.uint8)
        KvTensors(layers).gather([0], [row])
        assert row.tolist() == [2, 9, 10]

    def test_nothing_is_copied_for_no_blocks(self) -> None:
        tensors = KvTensors(make_layers(contiguous, SHAPES[0], torch.float32, 1))
        tensors.gather([], [])
        tensors.scatter([], [])


SHAPE = (80, 2, 4, 8)


class Side:
    """One engine's worker half: tensors, publisher and loader, and the replica's link to it."""

    def __init__(self, link: StoreLink, store: BlockStore, seed: int | None) -> None:
        self.link = link
        self.store = store
        self.layers = make_layers(contiguous, SHAPE, torch.float32, seed)
        self.tensors = KvTensors(self.layers)
        self.totals = TransferTotals()
        self.options = ConnectorOptions(**link.connector()[2])  # type: ignore[arg-type]
        self.notices = NoticeSender(self.options.notice_path)
        self.loader = Loader(self.tensors, store, NAMESPACE, self.notices, self.totals)

    @contextmanager
    def publisher(self, *, rows: int = 80, evict_after_blocks: int = 10_000, faults: str = "") -> Iterator[Publisher]:
        made = Publisher(
            self.tensors,
            self.store,
            self.notices,
            self.totals,
            staging_bytes=rows * self.tensors.block_bytes,
            evict_after_bytes=evict_after_blocks * self.tensors.block_bytes,
            faults=Faults.parse(faults),
        )
        try:
            yield made
        finally:
            made.close()

    def block(self, block_id: int) -> bytes:
        row = np.zeros(self.tensors.block_bytes, dtype=np.uint8)
        self.tensors.gather([block_id], [row])
        return row.tobytes()

    def publish(self, blocks: int) -> None:
        """Puts blocks 0, 1, ... under keys 0, 1, ... straight into the store."""
        payloads = [memoryview(bytearray(self.block(number))) for number in range(blocks)]
        assert set(self.store.put(keys(blocks), payloads)) == {PutOutcome.STORED}

    def job(self, blocks: int, *, is_async: bool = False) -> LoadJob:
        """Keys 0, 1, ... into engine blocks 79, 78, ..."""
        return LoadJob(
            request_id="r-internal",
            tag="r.d1",
            local_tokens=12,
            block_ids=[79 - number for number in range(blocks)],
            hashes=[one.block_hash for one in keys(blocks)],
            is_async=is_async,
        )


def keys(blocks: int) -> list[BlockKey]:
    return [key(number) for number in range(blocks)]


def make_link(tmp_path: Path, name: str) -> StoreLink:
    return StoreLink(EngineConfig(store_dir=str(tmp_path / "store")), NAMESPACE, tmp_path, name)


@pytest.fixture
def store(tmp_path: Path) -> ShmStore:
    return ShmStore(tmp_path / "store", capacity_bytes=1 << 30)


@pytest.fixture
async def make_side(tmp_path: Path, store: ShmStore) -> AsyncIterator[Callable[..., Side]]:
    sides: list[Side] = []

    def make(seed: int | None = 1, other_store: BlockStore | None = None) -> Side:
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
    async def test_the_replica_is_told_once_the_last_chunk_is_in_the_store(self, side: Side, store: ShmStore) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([5, 6], keys(4)[:2], tag="r.p1", prompt_keys=None)
            publisher.submit([7, 8], keys(4)[2:], tag="r.p1", prompt_keys=keys(4))
            assert await side.link.published("r.p1", 10.0) == 4
        for number in range(4):
            buffer = bytearray(side.tensors.block_bytes)
            assert store.get_into([key(number)], [memoryview(buffer)]) == [BlockOutcome.HIT]
            assert bytes(buffer) == side.block(5 + number)

    async def test_the_totals_come_with_the_notice(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([5, 6], keys(2), tag="r.p1", prompt_keys=keys(2))
            await side.link.published("r.p1", 10.0)
        totals = side.link.totals()
        assert (totals.published_blocks, totals.published_bytes) == (2, 2 * side.tensors.block_bytes)
        assert totals.unstored_blocks == 0

    async def test_what_the_engine_does_after_submit_does_not_change_the_block(self, side: Side, store: ShmStore) -> None:
        before = side.block(5)
        with side.publisher(faults="kv_publish.delay_s=0.05") as publisher:
            publisher.submit([5], keys(1), tag="r.p1", prompt_keys=None)
            side.layers["model.layers.0.attn"].zero_()
        buffer = bytearray(side.tensors.block_bytes)
        store.get_into(keys(1), [memoryview(buffer)])
        assert bytes(buffer) == before

    async def test_a_prompt_without_a_full_block_is_told_too(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([], [], tag="r.p1", prompt_keys=[])
            async with asyncio.timeout(10.0):
                assert await side.link.published("r.p1", 60.0) == 0
        assert side.link.totals().unstored_blocks == 0

    async def test_blocks_that_the_store_holds_are_not_stored_again(self, side: Side) -> None:
        side.publish(3)
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(rows=1) as publisher:
            publisher.submit([0, 1, 2, 3], keys(4), tag="r.p1", prompt_keys=keys(4))
            assert await side.link.published("r.p1", 10.0) == 4
        assert side.totals.published_blocks == 1

    async def test_what_finds_no_staging_row_is_counted_and_not_published(self, side: Side, store: ShmStore) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(rows=2) as publisher:
            publisher.submit([0, 1, 2, 3, 4], keys(5), tag="r.p1", prompt_keys=keys(5))
            assert await side.link.published("r.p1", 10.0) == 2
            assert side.link.totals().unstored_blocks == 3
            side.link.run_params("s.p1", load=True, publish=True)
            publisher.submit([2, 3], keys(4)[2:], tag="s.p1", prompt_keys=keys(5))  # the rows are free again
            assert await side.link.published("s.p1", 10.0) == 4
        assert store.contains(keys(5)) == [True] * 4 + [False]

    async def test_a_block_that_finds_no_room_is_counted_and_room_is_made(self, make_side: Callable[..., Side]) -> None:
        block_bytes = make_side().tensors.block_bytes
        side = make_side(other_store=DictStore(capacity_bytes=2 * block_bytes, max_bytes=3 * block_bytes))
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher() as publisher:
            publisher.submit([0, 1, 2], keys(3), tag="r.p1", prompt_keys=keys(3))
            assert await side.link.published("r.p1", 10.0) == 2
            assert side.link.totals().unstored_blocks == 1
            await eventually(lambda: side.totals.evicted_blocks > 0)
            side.link.run_params("s.p1", load=True, publish=True)
            publisher.submit([3], [key(3)], tag="s.p1", prompt_keys=[key(3)])
            assert await side.link.published("s.p1", 10.0) == 1

    async def test_the_store_is_brought_under_its_capacity_from_time_to_time(self, make_side: Callable[..., Side], tmp_path: Path) -> None:
        block_bytes = make_side().tensors.block_bytes
        small = ShmStore(tmp_path / "small", capacity_bytes=4 * block_bytes)
        side = make_side(other_store=small)
        with side.publisher(evict_after_blocks=5) as publisher:
            for number in range(10):
                publisher.submit([number], [key(number)], tag="r.p1", prompt_keys=None)
        assert side.totals.evicted_blocks > 0
        assert small.stats().used_bytes <= 4 * block_bytes

    async def test_a_broken_store_does_not_keep_the_replica_waiting(self, make_side: Callable[..., Side]) -> None:
        class Broken(DictStore):
            def put(self, keys: Sequence[BlockKey], payloads: Sequence[memoryview]) -> list[PutOutcome]:
                raise OSError("broken")

        side = make_side(other_store=Broken())
        with side.publisher(rows=1) as publisher:
            for tag in ("r.p1", "s.p1"):  # the second finds the row free
                side.link.run_params(tag, load=True, publish=True)
                publisher.submit([0], keys(1), tag=tag, prompt_keys=keys(1))
                async with asyncio.timeout(10.0):
                    assert await side.link.published(tag, 60.0) == 0
        assert side.totals.unstored_blocks == 0

    async def test_the_delay_fault_holds_back_blocks_and_notice(self, side: Side) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(faults="kv_publish.delay_s=0.2") as publisher:
            started_s = time.monotonic()
            publisher.submit([0], keys(1), tag="r.p1", prompt_keys=keys(1))
            assert await side.link.published("r.p1", 0.01) == 0
            assert await side.link.published("r.p1", 10.0) == 1
            assert time.monotonic() - started_s >= 0.2

    async def test_the_drop_fault_loses_every_nth_block(self, side: Side, store: ShmStore) -> None:
        side.link.run_params("r.p1", load=True, publish=True)
        with side.publisher(faults="kv_put.drop_every=2") as publisher:
            publisher.submit([0, 1, 2, 3], keys(4), tag="r.p1", prompt_keys=keys(4))
            assert await side.link.published("r.p1", 10.0) == 1
        assert store.contains(keys(4)) == [True, False, True, False]

    async def test_close_ends_the_thread_after_the_jobs_that_are_there(self, side: Side, store: ShmStore) -> None:
        with side.publisher(faults="kv_publish.delay_s=0.02") as publisher:
            for number in range(3):
                publisher.submit([number], [key(number)], tag="r.p1", prompt_keys=None)
            assert kv_threads() == ["kv-publisher"]
        assert kv_threads() == []
        assert store.contains(keys(3)) == [True] * 3
        publisher.close()

    async def test_a_replica_that_is_gone_does_not_break_the_publisher(self, side: Side, store: ShmStore) -> None:
        side.link.close()
        with side.publisher() as publisher:
            for number in range(2):
                publisher.submit([number], [key(number)], tag="r.p1", prompt_keys=[key(number)])
        assert store.contains(keys(2)) == [True, True]


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
    async def test_a_corrupt_block_invalidates_all_from_there_on(self, make_side: Callable[..., Side], store: ShmStore, bad: int) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(70)
        path = next((Path(source.options.store_dir) / NAMESPACE).glob(key(bad).block_hash.hex()))
        stored = bytearray(path.read_bytes())
        stored[-1] ^= 1
        path.write_bytes(stored)
        result = target.loader.load(target.job(70))
        assert result.invalid_block_ids == [79 - number for number in range(bad, 70)]
        assert all(target.block(79 - number) == source.block(number) for number in range(bad))
        assert not any(any(target.block(79 - number)) for number in range(bad, 70))
        assert (target.totals.corrupt_blocks, target.totals.missing_blocks, target.totals.loaded_blocks) == (1, 0, bad)
        assert store.contains([key(bad)]) == [False]
        await eventually(lambda: target.link.totals().corrupt_blocks == 1)

    async def test_a_missing_block_invalidates_all_from_there_on(self, make_side: Callable[..., Side], store: ShmStore) -> None:
        source, target = make_side(seed=1), make_side(seed=None)
        source.publish(4)
        store.quarantine(key(1))
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

    async def test_a_broken_store_ends_a_load_outside_the_step_too(self, make_side: Callable[..., Side]) -> None:
        class Broken(DictStore):
            def get_into(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[BlockOutcome]:
                raise OSError("broken")

        target = make_side(other_store=Broken())
        for _ in range(2):
            target.loader.load_later(target.job(2, is_async=True))
        results = await results_of(target.loader, 2)
        assert [result.invalid_block_ids for result in results] == [[79, 78]] * 2

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
            publisher.submit([0], keys(1), tag="r.p1", prompt_keys=keys(1))
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
