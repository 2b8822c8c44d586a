"""One node's blocks served to another: whole ones only, and as they are published."""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kv_transfer import peer_fetch, peer_server
from kv_transfer.arena import KEY_BYTES
from kv_transfer.arena_store import ArenaStore, Held
from kv_transfer.peer_wire import RequestKind, pack_request
from kv_transfer.store_totals import StoreTotals
from tandem.domain import BlockHash, Namespace
from tests.dict_store import NAMESPACE, block_hash, key
from tests.peer_sides import CAPACITY_BYTES, END, SIZE_BYTES, SLAB_BYTES, WAIT_S, Address, Side, server_threads, soon

pytestmark = pytest.mark.integration


class WatchedStore(ArenaStore):
    """Does `after_look` once blocks have been looked up for a frame, which is before they are sent; counts the looks."""

    looks = 0
    after_look: Callable[[], object] | None = None

    def held(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float) -> list[Held | None]:
        self.looks += 1
        found = super().held(namespace, hashes, lease_s=lease_s)
        if self.after_look is not None:
            self.after_look()
        return found


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return WatchedStore(tmp_path / "far", capacity_bytes=CAPACITY_BYTES)


@pytest.fixture
def far(tmp_path: Path, store: WatchedStore) -> Iterator[Side]:
    side = Side(tmp_path / "far", store=store)
    yield side
    side.close()


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Side]:
    side = Side(tmp_path / "near")
    yield side
    side.close()


@pytest.fixture
def address(far: Side, near: Side) -> Iterator[Address]:
    with far.serving() as address:
        yield address


class TestBlocks:
    def test_of_several_sizes_come_by_one_request(self, far: Side, near: Side, address: Address) -> None:
        sizes = [100, SIZE_BYTES, SIZE_BYTES, 20_000, SLAB_BYTES, 100]
        for number, size_bytes in enumerate(sizes):
            far.put(number, size_bytes=size_bytes)
        assert near.fetch(address, range(6)) == 6
        assert [near.held([number], size_bytes=size_bytes) for number, size_bytes in enumerate(sizes)] == [[number] for number in range(6)]
        assert far.totals.served_bytes == near.totals.fetched_bytes == sum(sizes)

    def test_of_another_namespace_are_others(self, far: Side, near: Side, address: Address) -> None:
        far.put(0)
        fetch = near.fetch_from(address)
        assert fetch.run(Namespace("ab" * 16), [block_hash(0)], timeout_s=WAIT_S) == 0
        assert (far.totals.served_blocks, far.totals.missing_blocks) == (0, 1)

    def test_by_the_thousand_come_in_many_frames(self, far: Side, near: Side, address: Address) -> None:
        numbers = range(700)
        far.put(*numbers)
        far.store.drop(NAMESPACE, [block_hash(number) for number in range(0, 700, 7)])
        assert near.fetch(address, numbers) == 600
        assert near.held(numbers) == [number for number in numbers if number % 7]
        assert far.totals.missing_blocks == 100

    def test_that_are_here_by_now_are_neither_stored_nor_lost(self, far: Side, near: Side, address: Address) -> None:
        far.put(0, 1)
        near.put(0)
        assert near.fetch(address, [0, 1]) == 1
        assert near.totals == StoreTotals(fetched_blocks=1, fetched_bytes=SIZE_BYTES)

    def test_that_find_no_room_are_read_past_and_counted(self, far: Side, near: Side, address: Address) -> None:
        far.put(*range(5))
        with contextlib.closing(ArenaStore(near.folder, capacity_bytes=1)) as hoarder:
            hoarder.prepare(SIZE_BYTES, 1 << 20)
            assert near.fetch(address, range(5)) == 0
            assert near.totals == StoreTotals(unstored_blocks=5)
        assert near.fetch(address, range(5)) == 5  # by the same connection

    def test_come_while_others_of_their_size_are_evicted_for_them(self, far: Side, near: Side, address: Address) -> None:
        numbers = range(CAPACITY_BYTES // SIZE_BYTES)
        far.put(*numbers)
        near.put(*range(10_000, 10_000 + len(numbers)))
        assert near.fetch(address, numbers) == len(numbers)
        assert near.store.stats().used_bytes <= CAPACITY_BYTES


class TestDamage:
    def test_in_the_source_goes_no_further_and_is_quarantined_there(self, far: Side, near: Side, address: Address) -> None:
        far.put(0, 1, 2)
        far.damage(1)
        assert near.fetch(address, [0, 1, 2]) == 2
        assert (near.held([0, 1, 2]), far.held([0, 1, 2])) == ([0, 2], [0, 2])
        assert (near.totals.corrupt_blocks, far.totals.corrupt_blocks) == (1, 1)

    def test_on_the_way_costs_the_source_nothing(self, far: Side, address: Address) -> None:
        far.put(0)
        with socket.create_connection(address, timeout=WAIT_S) as client:
            client.sendall(pack_request(RequestKind.CHECK, NAMESPACE, [block_hash(0), block_hash(1)]))
            assert client.recv(100) == END
        assert far.held([0]) == [0]
        assert far.totals == StoreTotals()

    @pytest.mark.parametrize("bit", [0, 7])
    def test_of_a_record_harms_its_own_block_only(self, far: Side, near: Side, address: Address, bit: int) -> None:
        damaged = range(1, KEY_BYTES + 24)
        far.put(0, *damaged, 100)
        for number in damaged:
            far.blocks.flip_record(key(number), number - 1, 1 << bit)
        near.fetch(address, range(101))
        assert {0, 100} <= set(near.held(range(101)))

    def test_that_makes_a_block_one_of_no_bytes_harms_its_own_block_only(self, far: Side, near: Side, address: Address) -> None:
        far.put(0, 1, 2)
        far.blocks.flip_record(key(1), KEY_BYTES + 1, SIZE_BYTES >> 8)
        assert near.fetch(address, [0, 1, 2]) == 2
        assert near.held([0, 1, 2]) == [0, 2]

    @pytest.mark.parametrize("is_reused", [False, True], ids=["overwritten", "evicted and its slot taken"])
    def test_done_while_a_block_is_being_sent_is_never_stored(
        self, far: Side, near: Side, store: WatchedStore, address: Address, is_reused: bool
    ) -> None:
        far.put(0, 1)
        slot = far.blocks.slot(key(1))

        def happen() -> None:
            store.after_look = None
            if is_reused:
                far.store.drop(NAMESPACE, [block_hash(1)])
                for number in range(2, 1000):
                    far.put(number)
                    if far.blocks.slot(key(number)) == slot:
                        break
            far.blocks.bytes_at(slot, SIZE_BYTES)[:] = 7

        store.after_look = happen
        assert near.fetch(address, [0, 1]) == 1
        assert near.held([0, 1]) == [0]
        assert near.totals.corrupt_blocks == 1
        assert far.totals.corrupt_blocks == (not is_reused)


class TestWaiting:
    @pytest.fixture
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(4) as threads:
            yield threads

    def test_blocks_arrive_as_they_are_published_and_the_last_one_ends_it(
        self, far: Side, near: Side, address: Address, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_server, "_SAY_WAITING_S", 1000.0)  # only the word of who publishes wakes it
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 1000.0)
        fetched = threads.submit(near.fetch, address, range(8), timeout_s=1e6, wait_s=60.0)
        soon(lambda: bool(server_threads()))
        for number in range(8):
            far.put(number)
            far.store.announce()
            soon(lambda number=number: near.count([number]) == 1)  # type: ignore[misc]
        assert fetched.result(WAIT_S) == 8
        assert near.held(range(8)) == list(range(8))

    def test_blocks_whose_word_was_lost_are_found_a_little_later(
        self, far: Side, near: Side, address: Address, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_server, "_SAY_WAITING_S", 0.02)
        fetched = threads.submit(near.fetch, address, range(2), wait_s=60.0)
        soon(lambda: bool(server_threads()))
        far.put(0, 1)
        assert fetched.result(WAIT_S) == 2

    def test_it_ends_when_its_time_is_over_with_what_there_is(
        self, far: Side, near: Side, address: Address, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_server, "_SAY_WAITING_S", 0.02)
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 0.2)  # shorter than the wait: the source says that it waits
        far.put(0, 2)
        assert near.fetch(address, [0, 1, 2], wait_s=0.4) == 2
        assert near.held([0, 1, 2]) == [0, 2]

    def test_a_source_waits_no_longer_than_its_own_bound(self, near: Side, address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_server, "_MAX_WAIT_S", 0.1)
        assert near.fetch(address, [0], timeout_s=1e6, wait_s=4e6) == 0

    def test_blocks_without_a_checksum_are_not_waited_for_in_a_busy_loop(
        self, tmp_path: Path, near: Side, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_server, "_SAY_WAITING_S", 0.05)
        store = WatchedStore(tmp_path / "unchecked", capacity_bytes=CAPACITY_BYTES, checksum=False)
        with contextlib.closing(Side(tmp_path / "unchecked", store=store)) as far:
            far.put(0)
            with far.serving() as address:
                assert near.fetch(address, [0], wait_s=0.2) == 0
        assert store.looks < 50

    def test_many_wait_at_once_and_all_are_served(self, far: Side, near: Side, address: Address, threads: ThreadPoolExecutor) -> None:
        fetches = [threads.submit(near.fetch, address, range(number, number + 3), wait_s=60.0) for number in range(4)]
        soon(lambda: len(server_threads()) == 4)
        for number in range(6):
            far.put(number)
            far.store.announce()
        for fetch in fetches:
            fetch.result(WAIT_S)
        assert near.held(range(6)) == list(range(6))

    def test_the_end_of_the_server_ends_who_waits(self, far: Side, near: Side, threads: ThreadPoolExecutor) -> None:
        with far.serving() as address:
            fetched = threads.submit(near.fetch, address, [0], timeout_s=1e6, wait_s=60.0)
            soon(lambda: bool(server_threads()))
        fetched.exception(WAIT_S)
