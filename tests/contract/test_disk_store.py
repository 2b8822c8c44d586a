"""What the disk store does besides the contract: it survives restarts and whatever a disk does."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.codec import HEADER_BYTES
from kv_transfer.disk_store import DiskStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.dict_store import NAMESPACE, block_hash, key
from tests.layers import ROOT
from tests.lower_tier_benches import flip, index_key
from tests.store_benches import OTHER, PAYLOAD, ROOMY_BYTES, SMALL_BYTES, A, as_rows, get, held, put

RECORD_BYTES = HEADER_BYTES + len(PAYLOAD)
SMALL_PAYLOAD_BYTES = 40
BLOCKS = 8


def payload_of(number: int, payload_bytes: int = len(PAYLOAD)) -> bytes:
    return random.Random(number).randbytes(payload_bytes)


def opened(folder: Path, capacity_bytes: int = ROOMY_BYTES) -> DiskStore:
    return DiskStore(folder, capacity_bytes=capacity_bytes, pause_s=0.0)


def filled(folder: Path, blocks: int = BLOCKS, payload_bytes: int = len(PAYLOAD)) -> Path:
    """The one segment of a closed store of blocks 0, 1, ..."""
    store = opened(folder)
    for number in range(blocks):
        assert put(store, key(number), payload_of(number, payload_bytes)) is PutOutcome.STORED
    store.close()
    [segment] = folder.glob("blocks-*.kv")
    return segment


def hits(store: DiskStore, blocks: int = BLOCKS) -> list[int]:
    """Which blocks are there, each with its own bytes."""
    outcomes = [get(store, key(number)) for number in range(blocks)]
    assert all(payload == payload_of(number) for number, (outcome, payload) in enumerate(outcomes) if outcome is BlockOutcome.HIT)
    return [number for number, (outcome, _) in enumerate(outcomes) if outcome is BlockOutcome.HIT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


class TestRestart:
    def test_blocks_are_there_again(self, folder: Path) -> None:
        filled(folder)
        store = opened(folder)
        assert hits(store) == list(range(BLOCKS))
        assert (store.stats().blocks, store.stats().used_bytes, store.lost_bytes) == (BLOCKS, BLOCKS * RECORD_BYTES, 0)
        assert put(store, A) is PutOutcome.EXISTS
        store.close()

    def test_blocks_of_a_killed_process_are_there_and_its_folder_is_free(self, folder: Path) -> None:
        program = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom tests.contract.test_disk_store import *\n"
            "store = opened(Path(sys.argv[1]))\nfor number in range(BLOCKS):\n    put(store, key(number), payload_of(number))\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=False).returncode == -9
        store = opened(folder)
        assert hits(store) == list(range(BLOCKS))
        store.close()

    def test_a_dropped_block_stays_away_and_those_behind_it_stay(self, folder: Path) -> None:
        filled(folder)
        store = opened(folder)
        assert store.drop(NAMESPACE, [block_hash(0), block_hash(3)]) == 2
        store.close()
        store = opened(folder)
        assert hits(store) == [1, 2, 4, 5, 6, 7]
        assert store.lost_bytes == 0
        put(store, key(3), payload_of(3))
        store.close()
        store = opened(folder)
        assert hits(store) == [1, 2, 3, 4, 5, 6, 7]
        store.close()

    @pytest.mark.parametrize("position", [0, HEADER_BYTES - 1, HEADER_BYTES + 5])
    def test_a_corrupt_block_that_was_found_stays_away_and_those_behind_it_stay(self, folder: Path, position: int) -> None:
        segment = filled(folder)
        store = opened(folder)
        flip(segment, 2 * RECORD_BYTES + position)
        assert get(store, key(2))[0] is BlockOutcome.CORRUPT
        store.close()
        store = opened(folder)
        assert hits(store) == [0, 1, 3, 4, 5, 6, 7]
        store.close()

    def test_a_block_that_was_being_moved_when_the_process_ended_is_one_block(self, folder: Path) -> None:
        segment = filled(folder)
        shutil.copy(segment, segment.with_name("blocks-0000000007.kv"))
        store = opened(folder)
        assert hits(store) == list(range(BLOCKS))
        store.drop(NAMESPACE, [block_hash(4)])
        store.close()
        store = opened(folder)
        assert hits(store) == [0, 1, 2, 3, 5, 6, 7]
        store.close()

    def test_a_smaller_capacity_is_kept_at_once(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        put_many(store, 0, 900)
        store.close()
        store = opened(folder, SMALL_BYTES // 4)
        assert store.stats().used_bytes <= SMALL_BYTES // 4
        assert held(store, [key(0), key(899)]) == [False, True]
        store.close()


class TestTornFiles:
    @pytest.mark.parametrize("missing_bytes", [1, len(PAYLOAD) - 1, len(PAYLOAD), len(PAYLOAD) + 1, RECORD_BYTES - 1])
    def test_half_a_block_at_the_end_is_cut_off(self, folder: Path, missing_bytes: int) -> None:
        segment = filled(folder)
        os.truncate(segment, BLOCKS * RECORD_BYTES - missing_bytes)
        store = opened(folder)
        assert hits(store) == list(range(BLOCKS - 1))
        assert store.lost_bytes == RECORD_BYTES - missing_bytes
        assert segment.stat().st_size == store.stats().used_bytes == (BLOCKS - 1) * RECORD_BYTES
        assert put(store, key(BLOCKS - 1), payload_of(BLOCKS - 1)) is PutOutcome.STORED
        store.close()
        store = opened(folder)
        assert (hits(store), store.lost_bytes) == (list(range(BLOCKS)), 0)
        store.close()

    def test_a_segment_cut_short_loses_what_was_behind(self, folder: Path) -> None:
        os.truncate(filled(folder), 3 * RECORD_BYTES + 10)
        store = opened(folder)
        assert (hits(store), store.lost_bytes) == ([0, 1, 2], 10)
        store.close()

    def test_a_segment_cut_short_beneath_an_open_store_is_misses(self, folder: Path) -> None:
        segment = filled(folder)
        store = opened(folder)
        os.truncate(segment, 3 * RECORD_BYTES + 10)
        assert hits(store) == [0, 1, 2]
        assert [put(store, key(number), payload_of(number)) for number in range(3, BLOCKS)] == [PutOutcome.STORED] * 5
        assert hits(store) == list(range(BLOCKS))
        store.close()

    def test_an_empty_segment_is_removed(self, folder: Path) -> None:
        segment = filled(folder)
        os.truncate(segment, 0)
        store = opened(folder)
        assert store.stats().blocks == 0
        assert not segment.exists()
        store.close()

    def test_a_segment_that_somebody_deleted_is_misses(self, folder: Path) -> None:
        segment = filled(folder)
        store = opened(folder)
        segment.unlink()
        assert hits(store) == []
        assert (store.error, store.stats().blocks, store.stats().used_bytes) == ("", 0, 0)
        assert put(store, A) is PutOutcome.STORED
        store.close()


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[tuple[Path, bytes]]:
    """A closed store of small blocks: its segment, and the bytes of it."""
    with tempfile.TemporaryDirectory() as name:
        segment = filled(Path(name), payload_bytes=SMALL_PAYLOAD_BYTES)
        yield segment, segment.read_bytes()


class TestFlippedBytes:
    # 60 examples of 40 flips: 2,400 damaged segments.
    @settings(max_examples=60)
    @given(flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)), min_size=40, max_size=40), is_open=st.booleans())
    def test_no_flipped_byte_of_a_segment_gives_a_wrong_byte(
        self, small_blocks: tuple[Path, bytes], flips: list[tuple[int, int]], is_open: bool
    ) -> None:
        segment, good = small_blocks
        record_bytes = HEADER_BYTES + SMALL_PAYLOAD_BYTES
        for where, mask in flips:
            position = where % len(good)
            segment.write_bytes(good)
            if is_open:
                store = opened(segment.parent)
                flip(segment, position, mask)
            else:
                flip(segment, position, mask)
                store = opened(segment.parent)
            damaged = position // record_bytes
            for number in range(BLOCKS):
                outcome, payload = get(store, key(number), SMALL_PAYLOAD_BYTES)
                assert outcome is not BlockOutcome.HIT or payload == payload_of(number, SMALL_PAYLOAD_BYTES)
                assert (outcome is BlockOutcome.HIT) == (number != damaged) or (not is_open and number > damaged)
            store.close()


def put_many(store: DiskStore, first: int, count: int) -> list[PutOutcome]:
    return [put(store, key(number), payload_of(number)) for number in range(first, first + count)]


class TestCapacity:
    def test_the_files_never_take_more(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        for number in range(3_000):
            assert put(store, key(number), payload_of(number)) is PutOutcome.STORED
            if number % 20 == 0:
                used_bytes = sum(path.stat().st_size for path in folder.glob("blocks-*.kv"))
                assert used_bytes == store.stats().used_bytes <= SMALL_BYTES
        assert store.stats().used_bytes > SMALL_BYTES * 3 // 4
        store.close()

    def test_what_is_used_again_and_again_stays(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        put_many(store, 0, 20)
        for number in range(20, 4_000):
            put(store, key(number), payload_of(number))
            if number % 300 == 0:
                assert hits(store, 10) == list(range(10))
        assert hits(store, 20) == list(range(10))
        assert store.stats().used_bytes <= SMALL_BYTES
        store.close()

    def test_a_store_whose_every_block_is_used_takes_new_ones_all_the_same(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        for number in range(3_000):
            assert put(store, key(number), payload_of(number)) is PutOutcome.STORED
            assert get(store, key(number))[1] == payload_of(number)
        assert store.stats().used_bytes <= SMALL_BYTES
        store.close()

    def test_a_spoilt_block_is_not_moved(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        put_many(store, 0, 2)
        assert hits(store, 2) == [0, 1]
        entry = store.log.index[index_key(key(0))]
        flip(entry.segment.path, entry.offset_bytes + 500)
        put_many(store, 2, 1_000)
        assert held(store, [key(0), key(1)]) == [False, True]
        store.close()


class TestThreads:
    def test_writers_readers_and_droppers_never_see_a_wrong_byte(self, folder: Path) -> None:
        store = opened(folder, SMALL_BYTES)
        payloads = [payload_of(number) for number in range(1_500)]

        def write(seed: int) -> int:
            rng = random.Random(seed)
            stored = 0
            for _ in range(300):
                first = rng.randrange(1_490)
                outcomes = store.put(NAMESPACE, [block_hash(first + i) for i in range(10)], as_rows(*payloads[first : first + 10]))
                stored += outcomes.count(PutOutcome.STORED)
                assert PutOutcome.NO_ROOM not in outcomes
                store.drop(NAMESPACE, [block_hash(rng.randrange(1_500))])
                store.make_room()
            return stored

        def read(seed: int) -> int:
            rng = random.Random(seed)
            found = 0
            for _ in range(2_000):
                first = rng.randrange(1_496)
                rows = np.zeros((4, len(PAYLOAD)), np.uint8)
                outcomes = store.get_into(NAMESPACE, [block_hash(first + i) for i in range(4)], rows)
                assert BlockOutcome.CORRUPT not in outcomes
                for i, outcome in enumerate(outcomes):
                    assert outcome is BlockOutcome.MISSING or rows[i].tobytes() == payloads[first + i]
                found += outcomes.count(BlockOutcome.HIT)
            return found

        with ThreadPoolExecutor(4) as pool:
            writers, readers = pool.map(write, (1, 2)), pool.map(read, (3, 4))
            assert min(*writers, *readers) > 0
        assert store.error == ""
        store.close()


def test_rows_of_the_wrong_block_are_never_a_hit(folder: Path) -> None:
    segment = filled(folder)
    store = opened(folder)
    stored = segment.read_bytes()
    segment.write_bytes(stored[RECORD_BYTES:] + stored[:RECORD_BYTES])
    assert hits(store) == []
    assert put(store, A, OTHER) is PutOutcome.STORED
    store.close()
