"""The disk store on a disk that is full, read-only or broken: values, one log line, and on it goes when the disk is well again."""

import errno
import itertools
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from kv_transfer.blocks import BlockKey
from kv_transfer.disk_store import DiskStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.errors import ConfigError
from tests.dict_store import key
from tests.store_benches import PAYLOAD, SMALL_BYTES, A, B, get, held, put

PAUSE_S = 0.05


def opened(folder: Path, capacity_bytes: int = SMALL_BYTES, pause_s: float = PAUSE_S) -> DiskStore:
    return DiskStore(folder, capacity_bytes=capacity_bytes, pause_s=pause_s)


pytest_plugins = ("tests.small_disk",)


def set_read_only(folder: Path, is_read_only: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'ro' if is_read_only else 'rw'}", str(folder)], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Takes all that is left of a file system."""
    others = folder / "others"
    with others.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(bytes(4096)))
    return others


def put_when_well(store: DiskStore, wanted: BlockKey) -> PutOutcome:
    """The outcome as soon as there is room; pauses may have grown."""
    deadline_s = monotonic() + 30.0
    while (outcome := put(store, wanted)) is PutOutcome.NO_ROOM and monotonic() < deadline_s:
        sleep(0.01)
    return outcome


def troubles(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("kv_tier_trouble")]


class TestFullDisk:
    def test_blocks_replace_others_where_the_capacity_cannot_be_reached(self, small_disk: Path) -> None:
        store = opened(small_disk / "store", 4 * SMALL_BYTES)
        outcomes = [put(store, key(number)) for number in range(3_000)]
        assert outcomes.count(PutOutcome.STORED) > 2_990
        assert get(store, key(2_999)) == (BlockOutcome.HIT, PAYLOAD)
        assert get(store, key(0))[0] is BlockOutcome.MISSING
        store.close()

    def test_a_disk_that_others_have_filled_takes_no_block_until_there_is_room(
        self, small_disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = opened(small_disk / "store")
        others = fill(small_disk)
        assert {put(store, key(number)) for number in range(100)} == {PutOutcome.NO_ROOM}
        assert store.error == os.strerror(errno.ENOSPC)
        assert (store.stats().blocks, store.stats().used_bytes) == (0, 0)
        assert len(troubles(caplog)) == 1
        others.unlink()
        assert put_when_well(store, A) is PutOutcome.STORED
        assert (store.error, get(store, A)[1]) == ("", PAYLOAD)
        assert list(small_disk.glob("store/blocks-*"))
        store.close()

    def test_blocks_that_are_there_stay_good_when_others_fill_it(self, small_disk: Path) -> None:
        store = opened(small_disk / "store", pause_s=60.0)
        put(store, A)
        fill(small_disk)
        outcomes = [put(store, key(number)) for number in range(2, 20)]
        assert outcomes[-1] is PutOutcome.NO_ROOM
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        store.close()
        store = opened(small_disk / "store")
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert (store.lost_bytes, store.stats().blocks) == (0, 1 + outcomes.count(PutOutcome.STORED))
        store.close()

    def test_no_room_for_as_much_as_the_format_is_a_config_error(self, small_disk: Path) -> None:
        fill(small_disk)
        with pytest.raises(ConfigError, match=r"cannot use .*store for KV blocks \(No space left"):
            opened(small_disk / "store")


class TestReadOnlyDisk:
    def test_blocks_can_be_read_and_none_can_be_put(self, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        store = opened(small_disk / "store")
        put(store, A)
        store.close()
        set_read_only(small_disk, True)
        store = opened(small_disk / "store")
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert {put(store, key(number)) for number in range(2, 50)} == {PutOutcome.NO_ROOM}
        assert store.error == os.strerror(errno.EROFS)
        assert len(troubles(caplog)) == 1
        assert store.drop(A.namespace, [A.block_hash]) == 1
        assert get(store, A)[0] is BlockOutcome.MISSING
        set_read_only(small_disk, False)
        assert put_when_well(store, B) is PutOutcome.STORED
        assert store.error == ""
        store.close()

    def test_a_disk_that_cannot_be_written_any_more_at_eviction_is_no_exception(self, small_disk: Path) -> None:
        store = opened(small_disk / "store", SMALL_BYTES // 2)
        for number in range(450):
            put(store, key(number))
        store.close()
        set_read_only(small_disk, True)
        store = opened(small_disk / "store", SMALL_BYTES // 4)
        assert store.error == os.strerror(errno.EROFS)
        blocks = store.stats().blocks
        assert blocks > 400  # what cannot be deleted can be read
        assert put(store, key(1_000)) is PutOutcome.NO_ROOM
        assert store.make_room() == 0
        assert (store.stats().blocks, get(store, key(0))[0]) == (blocks, BlockOutcome.HIT)
        store.close()
        set_read_only(small_disk, False)

    def test_a_new_folder_on_it_is_a_config_error(self, small_disk: Path) -> None:
        set_read_only(small_disk, True)
        with pytest.raises(ConfigError, match=r"\(Read-only file system\)"):
            opened(small_disk / "store")


class TestBrokenDisk:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> Iterator[tuple[DiskStore, Path, Path]]:
        """A store of three blocks, its segment, which the kernel cannot read (EIO), and the same whole."""
        store = opened(tmp_path / "disk", pause_s=0.3)
        for number in range(3):
            put(store, key(number))
        [segment] = (tmp_path / "disk").glob("blocks-*.kv")
        whole = segment.rename(tmp_path / "whole")
        segment.symlink_to("/proc/self/mem")
        yield store, segment, whole
        store.close()

    def test_what_cannot_be_read_is_missing_and_told_once(
        self, broken: tuple[DiskStore, Path, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        store, _, _ = broken
        with caplog.at_level(logging.WARNING):
            assert {get(store, key(number))[0] for number in range(3)} == {BlockOutcome.MISSING}
        assert store.error == os.strerror(errno.EIO)
        assert len(troubles(caplog)) == 1

    def test_the_disk_is_not_asked_during_the_pause_and_blocks_are_there_after_it(self, broken: tuple[DiskStore, Path, Path]) -> None:
        store, segment, whole = broken
        assert get(store, key(0))[0] is BlockOutcome.MISSING
        segment.unlink()
        whole.rename(segment)
        assert get(store, key(1))[0] is BlockOutcome.MISSING
        assert held(store, [key(1), key(2)]) == [False, False]
        sleep(0.3)
        assert held(store, [key(0), key(1), key(2)]) == [False, True, True]  # the first was perhaps the bad one
        assert get(store, key(1)) == (BlockOutcome.HIT, PAYLOAD)
        assert store.error == ""
