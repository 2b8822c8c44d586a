"""What every block store keeps to. A new store adds a bench to BENCHES, and a kind to tests/store_process.py where processes share it."""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from kv_transfer.blocks import BlockKey
from kv_transfer.shm_room import check_room
from kv_transfer.shm_store import ShmStore
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome
from tandem.errors import ConfigError, Reason
from tests.dict_store import DictStore, key
from tests.layers import ROOT
from tests.store_process import BLOCKS, PAYLOAD_BYTES, payload_of

A, B = key(1), key(2)
PAYLOAD = bytes(range(256)) * 4
OTHER = PAYLOAD[::-1]
ROOMY_BYTES = 1 << 30


class Bench(Protocol):
    """A kind of store, and what a test must do behind its back."""

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> BlockStore:
        """The store; a second call gives another user of the same blocks."""

    def full(self) -> AbstractContextManager[BlockStore]:
        """A store of the same kind that has no room for a PAYLOAD."""

    def raw(self, wanted: BlockKey) -> bytes:
        """All bytes stored of a block."""

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        """Damages a block."""

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        """Makes a block's last use look older."""

    def leftovers(self) -> list[str]:
        """What is kept and is no visible block, of both stores."""


class DictBench:
    def __init__(self, tmp_path: Path) -> None:
        self._store = DictStore()

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> DictStore:
        if capacity_bytes != ROOMY_BYTES:
            self._store = DictStore(capacity_bytes=capacity_bytes)
        return self._store

    @contextmanager
    def full(self) -> Iterator[DictStore]:
        yield DictStore(max_bytes=100)

    def raw(self, wanted: BlockKey) -> bytes:
        return self._store.blocks[wanted]

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        self._store.blocks[wanted] = stored

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        self._store.used_s[wanted] = -age_s

    def leftovers(self) -> list[str]:
        return []


class ShmBench:
    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"
        self._full_folder = tmp_path / "full"

    def open(self, capacity_bytes: int = ROOMY_BYTES) -> ShmStore:
        return ShmStore(self.folder, capacity_bytes=capacity_bytes)

    @contextmanager
    def full(self) -> Iterator[ShmStore]:
        """By the limit on file sizes, which the kernel checks where it checks for room."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        store = ShmStore(self._full_folder, capacity_bytes=ROOMY_BYTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(PAYLOAD) // 2, hard))
        try:
            yield store
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def path(self, wanted: BlockKey) -> Path:
        return self.folder / wanted.namespace / wanted.block_hash.hex()

    def raw(self, wanted: BlockKey) -> bytes:
        return self.path(wanted).read_bytes()

    def set_raw(self, wanted: BlockKey, stored: bytes) -> None:
        self.path(wanted).write_bytes(stored)

    def set_age_s(self, wanted: BlockKey, age_s: float) -> None:
        used_s = time.time() - age_s
        os.utime(self.path(wanted), (used_s, used_s))

    def leftovers(self) -> list[str]:
        return [
            path.name
            for folder in (self.folder, self._full_folder)
            for path in folder.rglob("*")
            if path.is_file() and len(path.name) != 64
        ]


BENCHES: dict[str, Callable[[Path], Bench]] = {"dict": DictBench, "shm": ShmBench}
SHARED_BY_PROCESSES = ("shm",)


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return BENCHES[request.param](tmp_path)


def put(store: BlockStore, wanted: BlockKey, payload: bytes = PAYLOAD) -> PutOutcome:
    return store.put([wanted], [memoryview(payload)])[0]


def get(store: BlockStore, wanted: BlockKey, payload_bytes: int = len(PAYLOAD)) -> tuple[BlockOutcome, bytes]:
    buffer = bytearray(payload_bytes)
    outcome = store.get_into([wanted], [memoryview(buffer)])[0]
    return outcome, bytes(buffer)


class TestPutAndGet:
    def test_what_was_put_is_got(self, bench: Bench) -> None:
        assert put(bench.open(), A) is PutOutcome.STORED
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)

    def test_an_empty_block_is_a_block(self, bench: Bench) -> None:
        assert put(bench.open(), A, b"") is PutOutcome.STORED
        assert get(bench.open(), A, 0) == (BlockOutcome.HIT, b"")

    def test_blocks_of_several_namespaces_are_kept_apart(self, bench: Bench) -> None:
        store = bench.open()
        elsewhere = BlockKey(type(A.namespace)("ff" * 16), A.block_hash)
        put(store, A)
        put(store, elsewhere, OTHER)
        assert get(store, A)[1] == PAYLOAD
        assert get(store, elsewhere)[1] == OTHER

    def test_a_missing_block_is_a_value(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.contains([A, B, A]) == [False, True, False]

    def test_a_second_put_finds_the_block(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        assert put(bench.open(), A, OTHER) is PutOutcome.EXISTS
        assert get(store, A)[1] == PAYLOAD

    def test_a_batch_answers_for_each_block_in_order(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B)
        assert store.put([A, B], [memoryview(PAYLOAD), memoryview(PAYLOAD)]) == [PutOutcome.STORED, PutOutcome.EXISTS]
        buffers = [memoryview(bytearray(len(PAYLOAD))) for _ in range(3)]
        assert store.get_into([A, key(3), B], buffers) == [BlockOutcome.HIT, BlockOutcome.MISSING, BlockOutcome.HIT]
        assert [bytes(buffer) == PAYLOAD for buffer in buffers] == [True, False, True]

    def test_empty_batches_are_fine(self, bench: Bench) -> None:
        store = bench.open()
        assert (store.contains([]), store.put([], []), store.get_into([], [])) == ([], [], [])

    def test_stats_count_the_visible_blocks(self, bench: Bench) -> None:
        store = bench.open()
        assert (store.stats().blocks, store.stats().used_bytes) == (0, 0)
        put(store, A)
        put(store, B)
        stats = store.stats()
        assert stats.blocks == 2
        assert stats.used_bytes == len(bench.raw(A)) + len(bench.raw(B))
        assert stats.capacity_bytes >= stats.used_bytes


class TestReservations:
    def test_an_uncommitted_block_is_invisible(self, bench: Bench) -> None:
        store = bench.open()
        reservation = store.try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        for _ in range(2):
            assert store.contains([A]) == [False]
            assert get(store, A)[0] is BlockOutcome.MISSING
            assert store.stats().blocks == 0
            reservation.write(memoryview(PAYLOAD))
        reservation.abort()

    def test_a_committed_block_is_visible_to_all(self, bench: Bench) -> None:
        reservation = bench.open().try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        reservation.write(memoryview(PAYLOAD))
        reservation.commit()
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)
        assert bench.leftovers() == []

    @pytest.mark.parametrize("is_written", [False, True])
    def test_an_aborted_one_leaves_nothing(self, bench: Bench, is_written: bool) -> None:
        store = bench.open()
        reservation = store.try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        if is_written:
            reservation.write(memoryview(PAYLOAD))
        reservation.abort()
        assert store.contains([A]) == [False]
        assert bench.leftovers() == []
        assert put(store, A) is PutOutcome.STORED

    def test_the_same_block_can_be_reserved_by_many(self, bench: Bench) -> None:
        store = bench.open()
        reservations = [user.try_reserve(A, len(PAYLOAD)) for user in (store, store, bench.open())]
        for reservation in reservations:
            assert reservation is not None
            reservation.write(memoryview(PAYLOAD))
            reservation.commit()
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert store.stats().blocks == 1

    def test_a_put_without_room_leaves_nothing(self, bench: Bench) -> None:
        with bench.full() as store:
            outcome = put(store, A)
        assert outcome is PutOutcome.NO_ROOM
        assert store.contains([A]) == [False]
        assert store.stats().blocks == 0
        assert bench.leftovers() == []


class TestDamage:
    def test_a_flipped_byte_anywhere_is_corrupt_and_then_missing(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A, PAYLOAD[:32])
        stored = bench.raw(A)
        for position in range(len(stored)):
            bench.set_raw(A, stored[:position] + bytes([stored[position] ^ 0x10]) + stored[position + 1 :])
            assert get(store, A, 32)[0] is BlockOutcome.CORRUPT, position
            assert get(store, A, 32)[0] is BlockOutcome.MISSING
            assert store.contains([A]) == [False]

    @pytest.mark.parametrize("kept_bytes", [0, 1, 40, -1])
    def test_a_truncated_block_is_corrupt_and_then_missing(self, bench: Bench, kept_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        bench.set_raw(A, bench.raw(A)[:kept_bytes])
        assert [get(store, A)[0] for _ in range(2)] == [BlockOutcome.CORRUPT, BlockOutcome.MISSING]

    @pytest.mark.parametrize("added_bytes", [1, 10_000])
    def test_a_block_that_is_too_long_is_corrupt_and_then_missing(self, bench: Bench, added_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        bench.set_raw(A, bench.raw(A) + bytes(added_bytes))
        assert [get(store, A)[0] for _ in range(2)] == [BlockOutcome.CORRUPT, BlockOutcome.MISSING]

    @pytest.mark.parametrize("wanted_bytes", [len(PAYLOAD) - 1, len(PAYLOAD) + 1])
    def test_a_block_of_another_size_than_the_buffer_is_corrupt(self, bench: Bench, wanted_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        assert get(store, A, wanted_bytes)[0] is BlockOutcome.CORRUPT

    def test_a_block_under_the_wrong_name_is_corrupt(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        put(store, B, OTHER)
        bench.set_raw(B, bench.raw(A))
        assert get(store, B)[0] is BlockOutcome.CORRUPT
        assert get(store, A)[0] is BlockOutcome.HIT

    def test_a_quarantined_block_can_be_put_again(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        store.quarantine(A)
        store.quarantine(A)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert put(store, A) is PutOutcome.STORED
        assert get(store, A)[0] is BlockOutcome.HIT


class TestEviction:
    @pytest.fixture
    def block_bytes(self, bench: Bench) -> int:
        put(bench.open(), A)
        block_bytes = len(bench.raw(A))
        bench.open().quarantine(A)
        return block_bytes

    def test_nothing_is_dropped_within_the_capacity(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(10 * block_bytes)
        for number in range(10):
            put(store, key(number))
        assert store.evict() == 0
        assert store.stats().blocks == 10

    def test_the_least_recently_used_go_down_to_the_low_watermark(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(20 * block_bytes)
        for number in range(21):
            put(store, key(number))
            bench.set_age_s(key(number), 100.0 - number)
        assert store.evict() == 3
        assert store.contains([key(number) for number in range(21)]) == [number >= 3 for number in range(21)]
        assert store.evict() == 0

    def test_a_get_is_a_use(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(10 * block_bytes)
        for number in range(11):
            put(store, key(number))
            bench.set_age_s(key(number), 100.0 - number)
        get(store, key(0))
        store.evict()
        assert store.contains([key(0), key(1)]) == [True, False]

    def test_an_empty_store_has_nothing_to_drop(self, bench: Bench) -> None:
        assert bench.open(1).evict() == 0


def run_together(kind: str, place: Path, *actions: str) -> list[dict[str, int]]:
    """One process for each action, all let go at once; what each of them says."""
    command = [sys.executable, "-m", "tests.store_process", kind, str(place)]
    processes = [
        subprocess.Popen([*command, action], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for action in actions
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(actions)
    return [json.loads(line) for line in said]


@pytest.mark.parametrize("kind", SHARED_BY_PROCESSES)
class TestProcesses:
    def test_two_that_put_the_same_blocks_leave_each_whole(self, kind: str, tmp_path: Path) -> None:
        bench = BENCHES[kind](tmp_path)
        store = bench.open()
        said = run_together(kind, tmp_path / "store", "put_all", "put_all")
        assert all(counts.get("stored", 0) + counts.get("exists", 0) == BLOCKS for counts in said)
        for number in range(BLOCKS):
            assert get(store, key(number), PAYLOAD_BYTES) == (BlockOutcome.HIT, payload_of(number))
        assert bench.leftovers() == []

    def test_a_reader_beside_evictors_never_gets_wrong_bytes(self, kind: str, tmp_path: Path) -> None:
        first, second, reader = run_together(kind, tmp_path / "store", "churn", "churn", "read")
        assert first["evicted"] > 0
        assert second["evicted"] > 0
        assert reader["hit"] > 0
        assert reader["missing"] > 0
        assert reader.get("corrupt", 0) == 0
        assert reader["wrong"] == 0


class TestShmStore:
    """What only files can get wrong."""

    @pytest.fixture
    def shm(self, tmp_path: Path) -> ShmBench:
        return ShmBench(tmp_path)

    def test_a_writer_that_dies_leaves_nothing(self, shm: ShmBench) -> None:
        program = "import sys, os, pathlib; from tests.dict_store import key; from kv_transfer.shm_store import ShmStore\n"
        program += "store = ShmStore(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 30); store.add_spare(10)\n"
        program += "store.try_reserve(key(1), 10).write(memoryview(b'0123456789')); os.kill(os.getpid(), 9)"
        shm.open()
        subprocess.run([sys.executable, "-c", program, str(shm.folder)], check=False)
        assert shm.leftovers() == []
        assert not any(path.is_file() for path in shm.folder.rglob("*"))

    def test_an_aborted_reservation_closes_its_own_file_only(self, shm: ShmBench) -> None:
        store = shm.open()
        late = store.try_reserve(A, len(PAYLOAD))
        assert late is not None
        late.write(memoryview(PAYLOAD))
        late.abort()
        # The number of the closed file is free again: a second abort must not close what has it now.
        with tempfile.TemporaryFile() as innocent:
            late.abort()
            innocent.write(b"still open")
        assert store.contains([A]) == [False]

    def test_spare_room_is_used_by_puts_of_its_size_and_of_others(self, shm: ShmBench) -> None:
        store = shm.open()
        assert store.add_spare(len(PAYLOAD))
        assert store.add_spare(len(PAYLOAD) + 1000)
        assert put(store, A) is PutOutcome.STORED
        assert put(store, B) is PutOutcome.STORED
        assert get(store, A) == get(store, B) == (BlockOutcome.HIT, PAYLOAD)
        store.close()

    def test_spare_room_is_bounded(self, shm: ShmBench) -> None:
        store = shm.open()
        made = 0
        while store.add_spare(1 << 20):
            made += 1
        assert made == 64
        store.close()

    def test_a_removed_folder_is_an_empty_store_and_is_made_again(self, shm: ShmBench) -> None:
        store = shm.open()
        put(store, A)
        store.destroy()
        assert not shm.folder.exists()
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.evict() == 0
        assert store.stats().blocks == 0
        assert put(store, A) is PutOutcome.STORED

    def test_a_file_among_the_namespaces_is_left_alone(self, shm: ShmBench) -> None:
        store = shm.open(1)
        (shm.folder / "notes").write_text("not a block")
        assert (store.stats().blocks, store.evict()) == (0, 0)

    def test_no_file_stays_open(self, shm: ShmBench) -> None:
        store = shm.open()
        before = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            put(store, key(number))
            get(store, key(number))
            get(store, key(number), 1)
            get(store, key(99))
            reservation = store.try_reserve(A, 10)
            assert reservation is not None
            reservation.abort()
        store.evict()
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize("place", ["file/store", "/proc/store", "/proc"])
    def test_a_folder_that_cannot_hold_blocks_is_told_with_what_to_do(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="choose another --store-dir"):
            ShmStore(tmp_path / place, capacity_bytes=1)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path_factory.mktemp("small-disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestFullFileSystem:
    """The capacity is a wish: the file system may be smaller, or filled by others."""

    def fill(self, store: BlockStore) -> int:
        for number in itertools.count():
            if put(store, key(number)) is PutOutcome.NO_ROOM:
                return number
        raise AssertionError

    def test_a_block_that_does_not_fit_is_left_out_whole(self, small_disk: Path) -> None:
        store = ShmStore(small_disk / "left-out", capacity_bytes=ROOMY_BYTES)
        blocks = self.fill(store)
        assert store.stats().blocks == blocks
        assert sum(path.is_file() for path in small_disk.rglob("*")) == blocks
        assert get(store, key(0)) == (BlockOutcome.HIT, PAYLOAD)
        store.destroy()

    def test_eviction_makes_room_although_the_capacity_is_not_reached(self, small_disk: Path) -> None:
        store = ShmStore(small_disk / "evicted", capacity_bytes=ROOMY_BYTES)
        blocks = self.fill(store)
        assert 0 < store.evict() < blocks
        assert put(store, key(blocks)) is PutOutcome.STORED
        store.destroy()

    def test_no_room_is_kept_ready_where_room_is_short(self, small_disk: Path) -> None:
        store = ShmStore(small_disk / "short", capacity_bytes=ROOMY_BYTES)
        assert not store.add_spare(1)
        store.destroy()

    def test_a_store_that_fills_it_is_room_for_the_next_replica(self, small_disk: Path) -> None:
        store = ShmStore(small_disk / "room", capacity_bytes=ROOMY_BYTES)
        self.fill(store)
        held_bytes = store.stats().used_bytes
        check_room(small_disk / "room", needed_bytes=held_bytes // 2)
        with pytest.raises(ConfigError, match="no room for KV blocks"):
            check_room(small_disk / "elsewhere", needed_bytes=held_bytes // 2)
        store.destroy()


class TestRoom:
    def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(self, tmp_path: Path) -> None:
        check_room(tmp_path / "a" / "b", needed_bytes=1)
        assert not (tmp_path / "a").exists()

    def test_too_little_room_is_told_with_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"MiB free, at least 1073741824 MiB needed; free some .* --store-dir") as caught:
            check_room(tmp_path, needed_bytes=1 << 50)
        assert caught.value.reason is Reason.NO_ROOM
