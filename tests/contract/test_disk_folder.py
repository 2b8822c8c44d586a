"""Whose the disk store's folder is: one process's at a time, one format's, and nobody else's files are touched."""

from pathlib import Path

import pytest

from kv_transfer.codec import HEADER_BYTES
from kv_transfer.disk_segments import FORMAT_FILE
from kv_transfer.disk_store import DiskStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.errors import ConfigError
from tests.dict_store import key
from tests.store_benches import PAYLOAD, ROOMY_BYTES, SMALL_BYTES, A, B, get, put


def opened(folder: Path, capacity_bytes: int = ROOMY_BYTES) -> DiskStore:
    return DiskStore(folder, capacity_bytes=capacity_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def segment(folder: Path) -> Path:
    """Of a closed store with a block in it."""
    store = opened(folder)
    put(store, A)
    store.close()
    [segment] = folder.glob("blocks-*.kv")
    return segment


class TestFolder:
    def test_a_second_store_is_refused_by_name(self, folder: Path) -> None:
        store = opened(folder)
        with pytest.raises(ConfigError, match=rf"{folder} is in use"):
            opened(folder)
        store.close()
        opened(folder).close()

    def test_another_format_is_refused_with_what_to_do(self, folder: Path, segment: Path) -> None:
        (folder / FORMAT_FILE).write_text("tandem kv blocks, format 9\n")
        with pytest.raises(ConfigError, match=rf"{folder} holds KV blocks of another format .*delete"):
            opened(folder)
        assert segment.stat().st_size == HEADER_BYTES + len(PAYLOAD)
        segment.unlink()
        (folder / FORMAT_FILE).unlink()
        opened(folder).close()

    def test_foreign_files_are_left_alone(self, folder: Path) -> None:
        (folder / "blocks-0000000003.kv").mkdir(parents=True)
        (folder / "blocks-5.kv").write_text("mine")
        (folder / "notes.txt").write_text("mine too")
        store = opened(folder, SMALL_BYTES)
        for number in range(2_000):
            put(store, key(number))
        store.close()
        assert (folder / "blocks-0000000003.kv").is_dir()
        assert ((folder / "blocks-5.kv").read_text(), (folder / "notes.txt").read_text()) == ("mine", "mine too")

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"cannot use .*file.* for KV blocks"):
            opened(tmp_path / "file" / "disk")

    def test_blocks_are_for_this_user_alone(self, folder: Path, segment: Path) -> None:
        assert (folder.stat().st_mode & 0o777, segment.stat().st_mode & 0o777) == (0o700, 0o600)

    def test_a_closed_store_has_nothing_and_takes_nothing(self, folder: Path) -> None:
        store = opened(folder)
        put(store, A)
        store.close()
        assert (put(store, B), get(store, A)[0]) == (PutOutcome.NO_ROOM, BlockOutcome.MISSING)
        store.close()
