"""Shared memory that is smaller than the capacity, or filled by others: puts are answered, nothing ends by a signal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.arena import FILE_NAME
from kv_transfer.arena_store import ArenaStore
from kv_transfer.shm_room import check_room
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.errors import ConfigError, Reason
from tests.dict_store import key
from tests.layers import ROOT
from tests.store_benches import PAYLOAD, SMALL_BYTES, A, get, held, put

# The table of the smallest arena takes about 540 KiB, so that 7 of its 16 slabs have room here.
_PROGRAM = """
import sys
from pathlib import Path
from kv_transfer.arena_store import ArenaStore
from tests.dict_store import key
from tests.store_benches import get, put
store = ArenaStore(Path(sys.argv[1]), capacity_bytes=1 << 20)
print({str(put(store, key(number))) for number in range(2_000)}, get(store, key(1_999))[0], flush=True)
"""

pytest_plugins = ("tests.small_disk",)


def fill_up(file: Path) -> None:
    """Takes all that the file system has left."""
    free_bytes = shutil.disk_usage(file.parent).free
    file.write_bytes(bytes(free_bytes))
    assert shutil.disk_usage(file.parent).free == 0


class TestFullFileSystem:
    def test_blocks_replace_others_where_the_capacity_cannot_be_reached(self, small_disk: Path) -> None:
        store = ArenaStore(small_disk / "store", capacity_bytes=SMALL_BYTES)
        assert {put(store, key(number)) for number in range(2_000)} == {PutOutcome.STORED}
        assert get(store, key(1_999)) == (BlockOutcome.HIT, PAYLOAD)
        assert get(store, key(0))[0] is BlockOutcome.MISSING
        assert 0 < store.stats().used_bytes < SMALL_BYTES // 2 < store.stats().capacity_bytes
        store.close()

    def test_no_process_ends_by_a_signal(self, small_disk: Path) -> None:
        folder = small_disk / "store"
        ran = subprocess.run([sys.executable, "-c", _PROGRAM, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (0, "{'stored'} hit\n"), ran.stderr

    def test_a_file_system_that_others_have_filled_takes_no_block(self, small_disk: Path) -> None:
        store = ArenaStore(small_disk / "store", capacity_bytes=SMALL_BYTES)
        fill_up(small_disk / "others")
        assert put(store, A) is PutOutcome.NO_ROOM
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.stats().blocks == 0
        store.close()

    def test_blocks_that_are_there_stay_good_when_others_fill_it(self, small_disk: Path) -> None:
        store = ArenaStore(small_disk / "store", capacity_bytes=SMALL_BYTES)
        put(store, A)
        fill_up(small_disk / "others")
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert {put(store, key(number)) for number in range(2, 200)} == {PutOutcome.STORED}
        assert held(store, [A, key(199)]) == [False, True]
        store.close()

    def test_an_arena_whose_table_has_no_room_is_told_so_and_leaves_nothing(self, small_disk: Path) -> None:
        with pytest.raises(ConfigError, match="no room for the KV arena") as caught:
            ArenaStore(small_disk / "store", capacity_bytes=1 << 30)
        assert caught.value.reason is Reason.NO_ROOM
        assert not list((small_disk / "store").glob(f"{FILE_NAME}*"))

    def test_an_arena_that_fills_it_is_room_for_the_next_replica(self, small_disk: Path) -> None:
        store = ArenaStore(small_disk / "store", capacity_bytes=SMALL_BYTES)
        for number in range(1_000):
            put(store, key(number))
        check_room(small_disk / "store", needed_bytes=SMALL_BYTES // 2)
        with pytest.raises(ConfigError, match="no room for KV blocks"):
            check_room(small_disk / "elsewhere", needed_bytes=SMALL_BYTES // 2)
        store.close()


class TestRoom:
    def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(self, tmp_path: Path) -> None:
        check_room(tmp_path / "a" / "b", needed_bytes=1)
        assert not (tmp_path / "a").exists()

    def test_too_little_room_is_told_with_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"MiB free, at least 1073741824 MiB needed; free some .* --store-dir") as caught:
            check_room(tmp_path, needed_bytes=1 << 50)
        assert caught.value.reason is Reason.NO_ROOM
