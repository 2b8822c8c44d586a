"""What only files in shared memory can get wrong: descriptors, dead writers, full file systems."""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_transfer.shm_room import check_room
from kv_transfer.shm_store import ShmStore
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome
from tandem.errors import ConfigError, Reason
from tests.dict_store import key
from tests.layers import ROOT
from tests.store_benches import PAYLOAD, ROOMY_BYTES, A, B, ShmBench, get, put


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
        died = subprocess.run([sys.executable, "-c", program, str(shm.folder)], cwd=ROOT, check=False)
        assert died.returncode == -9
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
