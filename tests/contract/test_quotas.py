"""What one model or one tenant may hold of an arena."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copies import BlockRows
from kv_transfer.quotas import tenant_of
from kv_transfer.store import PutOutcome
from tandem.domain import Namespace
from tests.dict_store import NAMESPACE, block_hash

SIZE_BYTES = 4096
OTHER = Namespace("ab" * 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArenaStore]:
    made = ArenaStore(tmp_path / "store", capacity_bytes=4 << 20)
    yield made
    made.close()


def put(store: ArenaStore, numbers: range, namespace: Namespace = NAMESPACE, tenant: int = 0) -> None:
    rows, hashes = np.ones((len(numbers), SIZE_BYTES), np.uint8), [block_hash(number) for number in numbers]
    store.prepare(SIZE_BYTES, len(numbers))
    outcomes = store.commit(store.stage(namespace, hashes, BlockRows((rows,)), np.arange(len(numbers)), tenant=tenant))
    assert set(outcomes) == {PutOutcome.STORED}


def held(store: ArenaStore, numbers: range, namespace: Namespace = NAMESPACE) -> int:
    return sum(store.contains(namespace, [block_hash(number) for number in numbers]))


class TestModels:
    def test_a_model_keeps_to_its_quota_and_leaves_others_alone(self, store: ArenaStore) -> None:
        put(store, range(100))
        put(store, range(100), OTHER)
        store.quotas.set_model(NAMESPACE, 40 * SIZE_BYTES)
        assert store.make_room() == 62
        assert (held(store, range(100)), held(store, range(100), OTHER)) == (38, 100)

    def test_another_process_reads_the_quota(self, store: ArenaStore, tmp_path: Path) -> None:
        other = ArenaStore(tmp_path / "store", capacity_bytes=4 << 20)
        other.quotas.set_model(NAMESPACE, 40 * SIZE_BYTES)
        other.close()
        put(store, range(100))
        assert store.make_room() == 62

    def test_the_least_recently_used_go(self, store: ArenaStore) -> None:
        put(store, range(100))
        store.arena.last_use_ms[:] -= np.uint32(5000)
        store.note_use(NAMESPACE, [block_hash(number) for number in range(10)])
        store.quotas.set_model(NAMESPACE, 20 * SIZE_BYTES)
        store.make_room()
        assert held(store, range(10)) == 10

    def test_a_quota_of_none_is_taken_away(self, store: ArenaStore) -> None:
        store.quotas.set_model(NAMESPACE, SIZE_BYTES)
        store.quotas.set_model(NAMESPACE, 0)
        put(store, range(10))
        assert store.make_room() == 0

    def test_leased_blocks_stay_over_the_quota(self, store: ArenaStore) -> None:
        put(store, range(10))
        store.contains(NAMESPACE, [block_hash(number) for number in range(10)], lease_s=30.0)
        store.quotas.set_model(NAMESPACE, SIZE_BYTES)
        assert store.make_room() == 0

    @pytest.mark.parametrize(("name", "words"), [("no namespace", "4096"), (str(NAMESPACE), "many"), (str(NAMESPACE), "")])
    def test_files_that_are_no_quotas_are_left_alone(self, store: ArenaStore, tmp_path: Path, name: str, words: str) -> None:
        (tmp_path / "store" / "quotas").mkdir()
        (tmp_path / "store" / "quotas" / name).write_text(words)
        put(store, range(10))
        assert store.make_room() == 0


class TestTenants:
    def test_each_tenant_has_the_same_quota(self, store: ArenaStore) -> None:
        store.quotas.tenant_bytes = 20 * SIZE_BYTES
        put(store, range(100), tenant=1)
        put(store, range(100, 110), tenant=2)
        put(store, range(200, 300))
        store.make_room()
        assert [held(store, range(start, stop)) for start, stop in ((0, 100), (100, 110), (200, 300))] == [19, 10, 100]

    def test_a_tenant_is_its_salt(self) -> None:
        assert tenant_of("") == 0
        assert 0 < tenant_of("a") != tenant_of("b")
